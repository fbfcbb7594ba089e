"""The report's pictures: matplotlib drawings as inline SVG that take their colours from the page they stand on."""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

N_COLOURS = 8  # --c0 ... --c7 of report.html
TEXT, SOFT, LINE, COLOUR = "#fe00f0", "#fe00f1", "#fe00f2", "#fe000"  # stand for the page's colours until it is known

Series = Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]  # label -> curves (x, y), one per seed
Point = tuple[str, float, float, float, float | None]  # label, value, low, high, a mark to hold it against


def curves(name: str, series: Series, x_label: str, y_label: str, ticks: Sequence[str] = ()) -> str:
    """Lines, one colour and dash per label. With `ticks` x counts from 1 and every place has a name."""

    def draw(axes: Any) -> None:
        lines: list[Any] = []
        for n, found in enumerate(series.values()):
            dash = ("-", "--", ":", "-.")[(n + n // N_COLOURS) % 4]  # another one when the colours begin anew
            style = {"color": f"{COLOUR}{n % N_COLOURS}", "linestyle": dash, "linewidth": 1.5}
            drawn = [axes.plot(x, y, **style, marker="o", markersize=2.5)[0] for x, y in found]
            lines.append(drawn[0])
        axes.set(xlabel=x_label, ylabel=y_label)
        if ticks:
            axes.set_xticks(range(1, len(ticks) + 1), ticks)
        elif all(isinstance(place, int) for x, _ in found for place in x):
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.figure.legend(lines, list(series), loc="outside lower center", ncols=n_columns)

    n_columns = max(1, min(3, 60 // (8 + max(map(len, series)))))  # as many as long names leave room for
    firsts = {label: found[0][1] for label, found in series.items()}
    told = "; ".join(f"{label}: {y[0]:.3g} to {y[-1]:.3g}, at most {max(y):.3g}" for label, y in firsts.items())
    return _svg(draw, f"{y_label} by {x_label}. {told}", name, 3 + 0.2 * -(-len(series) // n_columns))


def intervals(name: str, points: Sequence[Point], x_label: str) -> str:
    """A dot, a bar and perhaps a mark per label."""

    def draw(axes: Any) -> None:
        for y, (_, value, low, high, mark) in enumerate(points):
            axes.plot([low, high], [y, y], color=f"{COLOUR}1", linewidth=2)
            axes.plot(value, y, marker="o", color=f"{COLOUR}1")
            if mark is not None:
                axes.plot(mark, y, marker="|", markersize=14, color=TEXT)
        axes.set(xlabel=x_label, yticks=range(len(points)), yticklabels=[point[0] for point in points])
        axes.set_ylim(len(points) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=5)

    told = "; ".join(f"{label}: {value:.4g} ({low:.4g} to {high:.4g})" for label, value, low, high, _ in points)
    return _svg(draw, f"{x_label}. {told}", name, max(2.2, 0.8 + 0.32 * len(points)))


def _svg(draw: Callable[[Any], None], alt: str, name: str, height: float) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "text.color": TEXT, "axes.labelcolor": TEXT}
    settings |= {"xtick.color": SOFT, "ytick.color": SOFT, "axes.edgecolor": SOFT, "grid.color": LINE, "font.size": 9}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True}
    settings |= {"grid.linewidth": 0.6, "legend.frameon": False, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", text)  # ids must differ between the pictures of a page
    for stand_in, colour in ((TEXT, "text"), (SOFT, "soft"), (LINE, "line")):
        text = text.replace(stand_in, f"var(--{colour})")
    return re.sub(COLOUR + r"(\d)", r"var(--c\1)", text)

"""The loop that tunes the language model: stage 02 says on what, by which losses."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hnlm_ref import llm
from hnlm_ref.artifacts import own_share
from hnlm_ref.console import UserError, progress, say
from hnlm_ref.training import load_checkpoint, save_checkpoint


def tune(
    model: llm.NegativeModel,
    read: Callable[[list[int]], tuple[Tensor, ...]],
    losses: Callable[..., dict[str, Tensor]],
    targets: Tensor,
    users: list[int],
    held_out: list[int],
    *,
    team: Any,
    seed: int,
    checkpoint: Path,
    lr: float,
    lr_new: float,
    n_epochs: int,
    batch_size: int,
    grad_accum: int,
    warmup_steps: int,
    eval_every: int,
    patience: int,
    probe_users: int,
) -> dict:
    """Solve the head, tune what is trainable with AdamW, and leave in `model` the weights of the best look.

    Choice: no weight decay, gradients clipped to norm 1, rates that rise over `warmup_steps` and then fall linearly.

    read        users -> of their pairs h [B, d_llm], its head o [B, d_out], u, i int64 [B], and j int64 [B, m]
    losses      (o, u, i, j) -> losses by name, of which "objective" is the one to be lowered
    targets     float32 [I, d_out], what o is compared with
    checkpoint  file to go on from and to keep up to date, see `training.fit`
    A look is at the pairs of the `held_out` users. Processes of `team` share the micro-batches of a step and sum their
    gradients; everything else each of them does alike. Micro-batch m of step s is the same whenever and wherever it is
    computed. Returns {"step", "log": one dict per look, "best": its place in the log}.
    """
    device, unit = targets.device, normalize(targets, dim=1)  # [I, d_out]
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    learnt = {name: t for name, t in model.state_dict().items() if name in trainable or name.startswith("head.")}
    groups = [{"params": [p for n, p in trainable.items() if ("lora_" in n) is lora]} for lora in (True, False)]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    n_per_epoch = -(-len(users) // (batch_size * grad_accum))
    n_steps = n_epochs * n_per_epoch
    state: dict = {"step": 0, "log": [], "best": 1}

    def look(step: int) -> dict[str, float]:
        """Losses and accuracy on the held-out triplets, and the share of the catalogue that is nearer to h than j."""
        model.eval()
        n, totals = 0, Counter[str]()
        for _, o, u, i, j in llm.in_parallel(read, llm.cut(held_out, batch_size), device.type):
            cosine = normalize(o, dim=1) @ unit.T  # [B, I]
            to_p, to_n = cosine.gather(1, j), cosine.gather(1, i[:, None])
            figures = losses(o, u, i, j)
            figures["accuracy"] = (to_p > to_n).float().mean()
            figures["rank_of_positive"] = (cosine[:, None] > to_p[:, :, None]).float().mean()
            totals.update({f"held_out_{name}": len(u) * float(figure) for name, figure in figures.items()})
            n += len(u)
        found = {name: round(total / n, 6) for name, total in totals.items()}
        if not np.isfinite(list(found.values())).all():  # case E11
            cure = f"lr {lr} may be too large" if step else "raise n_users, pairs_per_user or probe_users"
            raise UserError(f"step {step}: a loss is not finite; {cure}")
        return found

    if checkpoint.exists():
        state, best = load_checkpoint(checkpoint, optimiser, model)
        say(f"[sft] going on after step {state['step']} of {n_steps}")
    else:
        state["log"].append({"step": 0, "head": "random", **look(0)})
        # Choice: the head starts at the ridge regression of what it should say: towards the mean of a pair's hard
        # negatives, half as far away from the item taken: from further away j is lost in the catalogue
        # (bench/TRIALS.md). Tuning then begins with a head that can read h.
        probed = llm.in_parallel(read, llm.cut(users[:probe_users], batch_size), device.type)
        h, _, _, i, j = (torch.cat(x) for x in zip(*probed, strict=True))
        model.head.solve(h, normalize(unit[j].mean(1), dim=1) - 0.5 * unit[i])
        state["log"].append({"step": 0, "head": "solved", **look(0)})
        say("\n".join(f"[sft] {line}" for line in state["log"]))
        best = {name: t.clone() for name, t in learnt.items()}
    seen = torch.zeros(2, dtype=torch.float64, device=device)  # sum of the losses since the last look, and how many
    started = state["step"]
    for step in progress(range(started, n_steps), initial=started, total=n_steps, desc="tuning", unit="step"):
        if len(state["log"]) - 1 - state["best"] >= patience:
            break
        model.train()
        epoch, place = divmod(step, n_per_epoch)  # every epoch has its own order
        batches = llm.cut(np.random.default_rng([seed, epoch]).permutation(users).tolist(), batch_size)
        total = [torch.zeros_like(p) for p in trainable.values()]
        for number, some, is_own in own_share(batches[place * grad_accum :][:grad_accum], team):
            of_batch = hash((seed, step, number))
            figures, gradients = llm.gradients(model, lambda some: read(some)[1:], some, losses, of_batch)
            for so_far, gradient in zip(total, gradients, strict=True):
                so_far.add_(gradient, alpha=is_own / grad_accum)
            seen += is_own * torch.tensor([figures["loss"].item(), 1.0], device=device)
        for p, gradient in zip(trainable.values(), accelerate.utils.reduce(total, "sum"), strict=True):
            p.grad = gradient
        rate = min((step + 1) / (warmup_steps + 1), 1 - step / n_steps)
        for group, highest in zip(optimiser.param_groups, (lr, lr_new), strict=True):
            group["lr"] = highest * rate
        torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        optimiser.step()
        state["step"] = step + 1
        if state["step"] % eval_every == 0 or state["step"] == n_steps:
            loss_sum, n = accelerate.utils.reduce(seen, "sum").tolist()
            seen.zero_()
            state["log"].append(line := {"step": state["step"], "loss": round(loss_sum / n, 6), **look(state["step"])})
            say(f"[sft] {line}")
            if line["held_out_objective"] < state["log"][state["best"]]["held_out_objective"]:
                state["best"], best = len(state["log"]) - 1, {name: t.clone() for name, t in learnt.items()}
            if team.is_main_process:
                save_checkpoint(checkpoint, optimiser, state, learnt, best)
    model.load_state_dict(best, strict=False)
    return state

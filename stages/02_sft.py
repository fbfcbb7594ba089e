"""Stage 2: teach the language model what a hard negative is, from collaborative signals.

Paper: supervised fine-tuning with collaborative signals. Reads prep/. Writes sft/: cf_user.npy, cf_item.npy (c_u, c_i),
item_text.npy, user_text.npy (untuned text vectors), targets.npy, triplets.jsonl, adapter/, projections.safetensors,
log.jsonl (one line per look at the held-out triplets; `loss` is L_sft on the steps since the last).

    python stages/02_sft.py --preset toy     # about 15 s on a CPU
"""

from dataclasses import dataclass

import numpy as np

from hnlm_ref.artifacts import Run, file_fingerprint, load_json, load_npy, resolve_path, save_jsonl, save_npy
from hnlm_ref.console import UserError, say
from hnlm_ref.knobs import StageCommand, knob


@dataclass(frozen=True)
class SftConfig:
    """Knobs of stage 2. Defaults suit a 135M model on two cores (bench/TRIALS.md); released: presets/toys.toml."""

    # model
    model: str = knob("tiny", "tiny, a folder, a hub id, a .gguf file, or package:NAME/path")
    dtype: str = knob("auto", "frozen weights; auto: bfloat16 where it is faster", ("auto", "float32", "bfloat16"))
    attention: str = knob(
        "sdpa", "attention code; eager tunes faster on short prompts in bfloat16 on a CPU", ("sdpa", "eager")
    )
    load_in_4bit: bool = knob(False, "frozen weights in 4 bits; needs CUDA and bitsandbytes")
    checkpointing: bool = knob(False, "recompute activations in the backward pass: less memory, more time")
    max_user_tokens: int = knob(64, "tokens of a prompt's user part, instruction included", low=1)
    max_item_tokens: int = knob(24, "tokens of a prompt's item part, soft tokens and EOS included", low=1)
    init_from: str | None = knob(None, "sft folder to start LoRA and soft tokens from; with n_epochs 0: transfer")
    lora_rank: int = knob(32, "rank of LoRA (r)", low=1)
    lora_alpha: int = knob(64, "scale of LoRA is alpha / r", low=1)
    lora_dropout: float = knob(0.05, "dropout in LoRA", low=0, high=0.99)
    # triplets
    n_users: int = knob(0, "users to tune on; 0: all", low=0)
    pairs_per_user: int = knob(4, "items of a user that triplets are made for, at most", low=1)
    n_positives: int = knob(8, "hard negatives mined per pair; more of them cost no further LLM calls", low=1)
    held_out_users: int = knob(32, "further users whose triplets are held out; at most a quarter of all", low=1)
    mining: str = knob("window", "how the hard negative of a triplet is drawn", ("window", "pool"))
    rank_from: int = knob(0, "window: first warm-up rank among the items not taken", low=0)
    rank_to: int = knob(20, "window: end of the ranks, excluded", low=1)
    pool_size: int = knob(16, "pool: the best-scored of so many random items not taken", low=1)
    guard_threshold: float | None = knob(None, "do not mine items this many deviations too similar to the user's own")
    target: str = knob("cf", "p and n of the triplet: warm-up vectors or text vectors of the items", ("cf", "text"))
    # optimisation
    lr: float = knob(1e-4, "learning rate of LoRA", low=0)
    lr_new: float = knob(1e-4, "learning rate of soft tokens and head", low=0)
    temperature: float = knob(0.05, "temperature of the in-batch loss (tau)", low=1e-6)
    own_weight: float = knob(2.0, "weight of a second loss, on each triplet's own negative alone", low=0)
    catalogue_weight: float = knob(
        0.5, "weight of the softmax over the catalogue; 0 here and in own_weight: the paper's loss alone", low=0
    )
    catalogue_temperature: float = knob(0.1, "temperature of that softmax", low=1e-6)
    probe_users: int = knob(320, "users whose pairs the head is solved on before tuning", low=1)
    n_epochs: int = knob(1, "passes over the triplets; 0: only the head is solved", low=0)
    batch_size: int = knob(4, "users per forward pass", low=1)
    grad_accum: int = knob(1, "forward passes per optimiser step", low=1)
    warmup_steps: int = knob(5, "steps over which the learning rate rises; it then falls linearly", low=0)
    eval_every: int = knob(20, "steps between evaluations on the held-out triplets, and between checkpoints", low=1)
    patience: int = knob(3, "stop after so many evaluations without a lower held-out loss", low=1)

    def __post_init__(self) -> None:
        if self.rank_to <= self.rank_from:
            raise UserError(f"rank_from {self.rank_from} and rank_to {self.rank_to} leave no rank to mine from")


def main(cfg: SftConfig, run: Run) -> dict:
    import accelerate
    import torch

    from hnlm_ref import llm, losses
    from hnlm_ref.negatives import mine_triplets
    from hnlm_ref.prompts import check_words, item_words
    from hnlm_ref.samplers import semantic_guard
    from hnlm_ref.training import warm_up
    from hnlm_ref.tuning import tune

    prep, out, device = run.prep(), run.out, run.device
    if cfg.target == "text" or cfg.guard_threshold is not None:
        check_words(prep.items, "target text and guard_threshold")
    if cfg.init_from:  # its LoRA fits the very weights that it was tuned on
        theirs = load_json(resolve_path(cfg.init_from) / "manifest.json")["knobs"]
        for name in ("model", "lora_rank", "lora_alpha", "lora_dropout"):
            if theirs.get(name) != getattr(cfg, name):  # None: the folder is another stage's
                raise UserError(f"init_from {cfg.init_from} was tuned with {name} = {theirs.get(name)}; take the same")
    torch.set_num_threads(run.n_threads or torch.get_num_threads())
    team = accelerate.PartialState(cpu=device == "cpu")  # the processes that share the steps: one, unless launched so

    # The model and its prompts, before anything is computed: what cannot be used is told at once (case D14).
    base, tokenizer = llm.load_llm(cfg.model, device, cfg.dtype, cfg.attention, cfg.load_in_4bit)
    llm.check_rows(cfg.model, base, max(cfg.max_user_tokens + cfg.max_item_tokens, llm.TEXT_TOKENS + 2))
    queries = llm.make_queries(tokenizer, prep.users, prep.items, cfg.max_user_tokens, cfg.max_item_tokens)
    n_parts = prep.n_users + prep.n_items
    say(f"[sft] {queries.n_shortened:,} of {n_parts:,} prompt parts (a user's, an item's) are cut to their token limit")

    # The collaborative signal c_u, c_i: from train alone, early-stopped on valid.
    with team.main_process_first():
        if not (out / "cf_item.npy").exists():
            how = {"seed": run.seed, "device": device, "n_threads": run.n_threads}
            tables = warm_up(prep.train, prep.valid, **how, checkpoint=out / "warm_up.safetensors")
            for name, table in zip(("cf_user", "cf_item"), tables, strict=True):
                save_npy(out / f"{name}.npy", table)
    cf_user, cf_item = load_npy(out / "cf_user.npy"), load_npy(out / "cf_item.npy")  # [U, d_cf], [I, d_cf]

    # Text vectors of the untuned model, for targets, guards and text-enhanced recommenders.
    if not (out / "user_text.npy").exists():  # in every process, as each may hold a share of the weights
        item_text = llm.text_vectors(base, tokenizer, [item_words(item) for item in prep.items])
        if run.manifest("prep")["knobs"]["profiles"] == "template":
            # Choice: a template profile is a list of titles; its vector is the mean of the user's training items.
            user_text = np.array([item_text[prep.train.row(u)].mean(axis=0) for u in range(prep.n_users)])  # [U, d_llm]
        else:
            user_text = llm.text_vectors(base, tokenizer, [user["profile"] for user in prep.users])
        if team.is_main_process:
            save_npy(out / "item_text.npy", item_text)
            save_npy(out / "user_text.npy", user_text)
    team.wait_for_everyone()
    item_text = load_npy(out / "item_text.npy")  # [I, d_llm]

    # What p and n are. Choice: fixed vectors, centred, so that what all items share decides no cosine (and of text
    # whitened, as raw hidden states are nearly parallel).
    targets = llm.whiten(item_text) if cfg.target == "text" else cf_item - cf_item.mean(axis=0)  # [I, d_out]
    if team.is_main_process:
        save_npy(out / "targets.npy", targets)
    targets = torch.from_numpy(targets).to(device)

    # Triplets (u, i, j), all of a user together; the first users' are held out.
    rng = np.random.default_rng(run.seed)
    blocked = prep.train
    if cfg.guard_threshold is not None:
        blocked = blocked.union(semantic_guard(item_text, prep.train, cfg.guard_threshold))
    drawn = rng.permutation(prep.n_users)[: cfg.held_out_users + (cfg.n_users or prep.n_users)].tolist()
    window = (cfg.rank_from, cfg.rank_to) if cfg.mining == "window" else None
    mined = mine_triplets(
        prep, (cf_user, cf_item), blocked, drawn, cfg.pairs_per_user, cfg.n_positives, window, cfg.pool_size, rng
    )
    # Choice: at most a quarter of the users is held out, so that a small log can be tuned on too.
    held_out = list(mined)[: min(cfg.held_out_users, max(len(mined) // 4, 1))]
    users = [u for u in mined if u not in held_out][: cfg.n_users or len(mined)]
    if not users:
        left = f"only {len(mined)} users have an item not taken, nor refused by guard_threshold, as a negative"
        raise UserError(f"{left}; at least one to tune on and one held out are needed")
    n_without = len(drawn) - len(mined)
    mined = {u: mined[u] for u in (*held_out, *users)}
    if team.is_main_process:
        triplets = (
            {"user": u, "item": i, "positive": j, "negative": i, "held_out": u in held_out}
            for u, pairs in mined.items()
            for i, *mined_items in pairs.tolist()
            for j in mined_items
        )
        save_jsonl(out / "triplets.jsonl", triplets)
    n_triplets = sum(len(pairs) for pairs in mined.values()) * cfg.n_positives
    say(f"[sft] {n_triplets:,} triplets, those of {len(held_out)} users held out")

    # Beside the frozen weights: LoRA, soft tokens, head.
    torch.manual_seed(run.seed)
    if cfg.init_from:
        lora = llm.load_lora(base, resolve_path(cfg.init_from) / "adapter", trainable=True)
    else:
        lora = llm.add_lora(base, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    model = llm.NegativeModel(lora, cf_user, cf_item, targets.shape[1])
    if cfg.init_from:  # not the head: the warm-up spaces of two data sets have nothing to do with each other
        model.load_projections(resolve_path(cfg.init_from), head=False)
    if cfg.checkpointing:  # not reentrant, so that gradients reach LoRA although the weights are frozen (case D10)
        lora.gradient_checkpointing_enable({"use_reentrant": False})

    def read(some: list[int]) -> tuple[torch.Tensor, ...]:
        """h [B, d_llm] and its head [B, d_out] for these users' pairs, their numbers u, i [B], and j [B, m]."""
        u = torch.tensor(np.repeat(some, [len(mined[user]) for user in some]), device=device)
        ij = torch.from_numpy(np.concatenate([mined[user] for user in some])).to(device)
        rows = [queries.row(user, mined[user][:, 0]) for user in some]
        return *model(llm.pack(rows, device)), u, ij[:, 0], ij[:, 1:]

    def all_losses(o: torch.Tensor, u: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> dict[str, torch.Tensor]:
        # Every j of a pair makes a triplet; the pair's vector is the same for all of them.
        o, u, i = (x.repeat_interleave(j.shape[1], dim=0) for x in (o, u, i))
        p, n = targets[j.flatten()], targets[i]  # [B m, d_out]
        loss = losses.sft_loss(o, p, n, u, i, cfg.temperature)
        # Choice: beside the paper's loss, the own negative by itself, since it hardly counts among B columns and
        # cos(h, p) stays below cos(h, n) for almost half of the held-out triplets; and, as it costs no further call of
        # the LLM, the softmax over the catalogue.
        own = losses.contrast_loss(o, p, n, cfg.temperature)
        catalogue = losses.info_nce(o, targets, cfg.catalogue_temperature, j.flatten())
        objective = loss + cfg.own_weight * own + cfg.catalogue_weight * catalogue
        return {"objective": objective, "loss": loss, "own_loss": own, "catalogue_loss": catalogue}

    # Tune, and keep the weights that are best on the held-out triplets.
    schedule = ("lr", "lr_new", "n_epochs", "batch_size", "grad_accum", "warmup_steps", "eval_every", "patience")
    options = {name: getattr(cfg, name) for name in (*schedule, "probe_users")}
    options |= {"team": team, "seed": run.seed, "checkpoint": out / "checkpoint.safetensors"}
    done = tune(model, read, all_losses, targets, users, held_out, **options)
    if not team.is_main_process:
        return {}
    model.save(out)
    save_jsonl(out / "log.jsonl", done["log"])
    return {
        "counts": {
            "users without an item to mine": n_without,
            "prompt parts cut": queries.n_shortened,
            "model fingerprint": file_fingerprint(resolve_path(cfg.model)),
            "dtype": str(base.dtype).removeprefix("torch."),
            "triplets": n_triplets,
            "steps": done["step"],
            "before": done["log"][0],
            "kept": done["log"][done["best"]],
        }
    }


def files(cfg: SftConfig) -> list[str]:
    return [name for name in (cfg.model, cfg.init_from) if name not in (None, "tiny")]


command = StageCommand("sft", SftConfig, main, reads=("prep",), files=files)
if __name__ == "__main__":
    command()

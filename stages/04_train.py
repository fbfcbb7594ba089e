"""Stage 4: train one recommender by one method, its negatives sampled, generated, or a mixture of both.

Paper: sections on semantic alignment and training. Reads prep/; generate/ for HNLMRec; sft/ for the guard, the warm
start and the LLM-enhanced recommenders. Writes train/METHOD/seedK/: model.safetensors, user.npy [U, d] and item.npy
[I, d] (what is scored), negatives.npy int32 [R n, 2] (user, negative) as the final model would draw them for one epoch
(of hnlm the sampled j alone, as e_hard is no item; of MixGCF layer 0's), log.jsonl (one line per epoch: the losses
before their weights; norm_hard, norm_sampled: lengths of alpha e_hard and (1 - alpha) e_j; neg_percentile: share of the
catalogue that scores below the negative; valid_ndcg@20).

    python stages/04_train.py --preset toy --method hnlm     # about 3 s on a CPU

    loss = L_rank(e_u, e_i, e_minus) + lambda_cl L_cl(e_u, e_i, e_hard) + lambda_reg L2
           + lambda_extra L_extra (of RLMRec, or of an encoder of your own) + L_anchor(e_hard)
    e_minus = alpha e_hard + (1 - alpha) e_j,    e_hard = adapter(h(u, i)),    j from an ordinary sampler

L_anchor alone trains the adapter when --adapter-grad is "anchored", our default; the paper's "joint" has no such term.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from hnlm_ref.artifacts import Run, load_npy, resolve_path, save_jsonl, save_npy
from hnlm_ref.console import UserError, say
from hnlm_ref.knobs import StageCommand, knob

GENERATED = ("hnlm", "hnlm_matched", "hnlm_pool")  # the samplers that read stage 3
ORDINARY = ("uniform", "popularity", "dns", "dns_mn", "mixgcf", "ahns")


@dataclass(frozen=True)
class TrainConfig:
    """Knobs of stage 4. n_layers, the initial vectors and L2 are LightGCN's; hinge_margin, lambda_cl and cl_temperature
    the released code's; ahns_* its authors'; the others were chosen on MovieLens-100K (bench/TRIALS.md) or are what
    `compare` tunes."""

    method: str = knob("uniform", "name of the folder, and of the preset's [methods.NAME] table")
    # the recommender
    backbone: str = knob("lightgcn", "encoder", ("lightgcn", "mf"))
    dim: int = knob(64, "dimension of user and item vectors (d)", low=1)
    n_layers: int = knob(2, "propagations of LightGCN", low=0)
    enhancer: str = knob("none", "LLM-enhanced recommender", ("none", "rlmrec_con", "rlmrec_gen", "kar"))
    warm_start: bool = knob(False, "start from the vectors of the warm-up recommender (c_u, c_i of stage 2)")
    # the negatives
    sampler: str = knob("uniform", "where negatives come from", ORDINARY + GENERATED)
    n_negatives: int = knob(1, "negatives per positive (n)", low=1)
    pool_size: int = knob(4, "candidates per negative (M) of dns, dns_mn, mixgcf, ahns and hnlm_pool", low=1)
    popularity_beta: float = knob(0.75, "popularity: draws in proportion to popularity^beta", low=0)
    n_top: int = knob(2, "dns_mn: draw among so many best of the pool (M in its paper, where N is pool_size)", low=1)
    ahns_alpha: float = knob(1.0, "ahns: alpha in beta (s_ui + alpha)^(p + 1)")
    ahns_beta: float = knob(0.1, "ahns: beta")
    ahns_p: float = knob(-2.0, "ahns: p")
    guard_threshold: float | None = knob(None, "refuse candidates this many deviations too similar to the user's items")
    # generated negatives
    base_sampler: str = knob("uniform", "hnlm, hnlm_matched: ordinary sampler that draws j", ORDINARY)
    mix_alpha: float = knob(0.1, "hnlm: weight of e_hard in the mixture (alpha); 0 is the base sampler", low=0, high=1)
    n_matched: int = knob(1, "hnlm_matched, hnlm_pool: matched items that compete for a row's negative", low=1)
    match_temperature: float = knob(0.1, "hnlm_matched, hnlm_pool: temperature of drawing matched items", low=1e-6)
    matched_share: float = knob(1.0, "hnlm_matched, hnlm_pool: share of the rows that see matched items", low=0, high=1)
    n_ramp_epochs: int = knob(0, "epochs over which alpha and matched_share rise to their value", low=0)
    min_coverage: float = knob(0.5, "least share of training pairs that must have a generated negative", low=0, high=1)
    generate_dir: str | None = knob(None, "finished generate folder of another run on the same prep; none: this run's")
    adapter: str = knob("mlp", "from the LLM's space to the recommender's", ("mlp", "attention"))
    adapter_hidden: int = knob(256, "width of the adapter's hidden layer", low=1)
    adapter_grad: str = knob("anchored", "trained by losses (paper), or to hit its best match", ("joint", "anchored"))
    # the losses
    rank_loss: str = knob("bpr", "L_rank", ("bpr", "hinge"))
    hinge_margin: float = knob(0.3, "margin of the hinge loss")
    lambda_cl: float = knob(1e-3, "weight of L_cl, which pushes e_hard and e_u apart", low=0)
    cl_temperature: float = knob(0.2, "temperature of L_cl (tau)", low=1e-6)
    lambda_reg: float = knob(1e-4, "weight of L2 on the batch's ego vectors", low=0)
    lambda_extra: float = knob(0.1, "weight of the enhancer: of RLMRec's loss, of KAR's vectors", low=0)
    # optimisation
    lr: float = knob(5e-3, "learning rate of Adam", low=0)
    batch_size: int = knob(2048, "training pairs per step (B)", low=1)
    n_epochs: int = knob(100, "epochs at most", low=1)
    patience: int = knob(10, "stop after so many validations without a better NDCG@20", low=1)
    eval_every: int = knob(1, "epochs between validations", low=1)
    checkpoint_every: int = knob(5, "epochs between checkpoints", low=1)
    amp: bool = knob(True, "compute the adapter in bfloat16; on a GPU only")

    def __post_init__(self) -> None:
        if self.sampler == "hnlm_matched" and self.base_sampler == "mixgcf":
            raise UserError("hnlm_matched: mixgcf makes vectors, not items that matched ones could replace; use hnlm")
        if "dns_mn" in (self.sampler, self.base_sampler) and self.n_top > self.pool_size:
            raise UserError(f"n_top {self.n_top} is above pool_size {self.pool_size}: dns_mn draws from the pool")
        if self.enhancer == "rlmrec_gen" and (self.backbone == "mf" or self.n_layers == 0):
            raise UserError("rlmrec_gen tells a masked node by its neighbours, which mf and 0 layers do not look at")


def reads(cfg: TrainConfig, run: Run) -> list[str]:
    generate = cfg.sampler in GENERATED and cfg.generate_dir is None
    sft = cfg.guard_threshold is not None or cfg.enhancer != "none" or cfg.warm_start
    return ["prep", *["sft"] * sft, *["generate"] * generate]


def generated_folder(cfg: TrainConfig, run: Run) -> Path:
    """This run's generate/, or another run's if it was made from the same preparation (cases A22, E13)."""
    if cfg.generate_dir is None:
        return run.folder("generate")
    folder = resolve_path(cfg.generate_dir)
    if not (folder / "manifest.json").exists():
        raise UserError(f"generate_dir {folder} is no finished generate folder: it has no manifest.json")
    made_from, here = Run(folder.parent).manifest(folder.name)["inputs"].get("prep", "none"), run.fingerprint("prep")
    if made_from != here:
        raise UserError(f"generate_dir {folder} was made from prep {made_from}, this run's prep is {here}")
    return folder


def main(cfg: TrainConfig, run: Run) -> dict:
    import torch
    from safetensors.torch import save_file
    from torch import nn
    from torch.nn import functional

    from hnlm_ref import baselines, losses, prompts, recommender, samplers, training

    torch.set_num_threads(run.n_threads or torch.get_num_threads())
    prep = run.prep()
    train = prep.train
    if cfg.guard_threshold is not None or cfg.enhancer != "none":
        prompts.check_words(prep.items, "guard_threshold and enhancers")
    pairs = samplers.trainable_pairs(train)  # [R, 2]
    free = prep.n_items - train.degrees()
    if len(pairs) < train.nnz:
        full = np.flatnonzero(free == 0)
        who = f"user {prep.users[full[0]]['key']!r} ({prep.n_items} of {prep.n_items} items seen)"
        say(f"{len(full)} users have no item left as a negative and are skipped in training, the first is {who}")
    if not len(pairs):
        raise UserError(f"{run.dir / 'prep'} leaves nothing to train on: {who}, and so has every other user")

    # What is trained: an encoder, enhanced by texts or not, and the adapter of generated vectors if they are mixed in.
    torch.manual_seed(training.epoch_seed(run.seed, 0))
    encoder = recommender.ENCODERS[cfg.backbone](train, cfg.dim, cfg.n_layers)
    if cfg.warm_start:
        warm = np.concatenate([load_npy(run.folder("sft") / name) for name in ("cf_user.npy", "cf_item.npy")])
        if warm.shape != encoder.table.shape:
            raise UserError(f"warm_start: stage 2's warm-up has vectors of {warm.shape[1]} numbers, dim is {cfg.dim}")
        encoder.table.data.copy_(torch.from_numpy(warm))  # [U + I, d]
    if cfg.enhancer != "none":
        texts = [load_npy(run.folder("sft") / name) for name in ("user_text.npy", "item_text.npy")]
        make = baselines.ENHANCERS[cfg.enhancer]
        encoder.enhancer = make(np.concatenate(texts), prep.n_users, cfg.dim, cfg.lambda_extra)
    model = nn.ModuleDict({"encoder": encoder})

    # Where negatives come from: the catalogue, less what the guard refuses; and what stage 3 generated.
    blocked = generated = None
    if cfg.guard_threshold is not None:
        blocked = samplers.semantic_guard(load_npy(run.folder("sft") / "item_text.npy"), train, cfg.guard_threshold)
    if cfg.sampler in GENERATED:
        folder = generated_folder(cfg, run)
        by_item = cfg.sampler != "hnlm"
        generated = samplers.load_generated(folder, train, pairs, cfg.min_coverage, blocked, run.device, by_item)
    knobs = {f.name: getattr(cfg, f.name) for f in fields(samplers.Sampler) if hasattr(cfg, f.name)}
    sampler = samplers.Sampler(train=train, blocked=blocked, generated=generated, n_threads=run.n_threads, **knobs)
    if len(short := free[(free > 0) & (free < sampler.n_candidates)]):
        most = sampler.n_candidates - short.min()
        say(f"{len(short)} users are short of {sampler.n_candidates} candidates, by {most} at most: theirs repeat")
    mixes = cfg.sampler == "hnlm" and cfg.mix_alpha > 0
    if mixes:
        scale = generated.mean, generated.deviation  # of h, float32 [d_llm]
        model["adapter"] = recommender.SemanticAdapter(*scale, cfg.dim, cfg.adapter_hidden, cfg.adapter)
    model.to(run.device)
    own_loss = type(encoder).extra_loss is not recommender.Encoder.extra_loss
    if losses.products_vary() and (mixes or own_loss or cfg.enhancer != "none"):
        torch.set_num_threads(1)  # dense products, which would depend on the number of threads

    def mix_in(batch, e_u, e_i, e_minus, item_emb):
        """e_minus [B, n, d] with e_hard mixed in where there is one, and the terms that only e_hard has."""
        has, h = generated.vectors_of(batch.rows)  # the P rows with a generated negative, and h(u, i) [P, d_llm]
        with torch.autocast(run.device, torch.bfloat16, enabled=cfg.amp and run.device == "cuda"):
            e_hard = model["adapter"](h).float()  # [P, d]
        # Choice: as long as item vectors are on average. Left free, the ranking loss makes it long and easy (away
        # from e_u) within an epoch, and alpha means nothing.
        length = losses.total(item_emb.detach().norm(dim=1)) / prep.n_items
        e_hard = functional.normalize(e_hard) * length
        terms = {}
        if cfg.adapter_grad == "anchored":
            nearest = generated.matches_of(batch.rows[has])[0][:, 0]  # [P], -1: none, or refused by the guard
            terms["anchor"] = losses.anchor_loss(e_hard[nearest >= 0], item_emb[nearest[nearest >= 0]])
            e_hard = e_hard.detach()
        alpha = cfg.mix_alpha * sampler.ramp(batch.epoch)
        e_j = e_minus[has]  # [P, n, d]
        e_minus = e_minus.index_put((has,), losses.mix(e_hard, e_j, alpha))
        terms["norm_hard"] = alpha * losses.total(e_hard.norm(dim=-1)) / max(len(has), 1)
        terms["norm_sampled"] = (1 - alpha) * losses.total(e_j.norm(dim=-1)) / max(e_j.shape[:2].numel(), 1)
        terms["cl"] = losses.contrast_loss(e_u[has], e_i[has], e_hard, cfg.cl_temperature)
        return e_minus, terms

    def batch_loss(batch, layers):
        user_emb, item_emb = encoder.split(layers)  # [U, d], [I, d]
        e_u = losses.take(user_emb, batch.users)  # [B, d]
        e_i = losses.take(item_emb, batch.items)  # [B, d]
        j, e_minus = sampler.pick(batch, layers, user_emb, item_emb)  # [B, n], [B, n, d]
        terms = {}
        if mixes:
            e_minus, terms = mix_in(batch, e_u, e_i, e_minus, item_emb)
        gaps = losses.score_gaps(e_u, e_i, e_minus)  # [B, n]
        terms["rank"] = losses.bpr_loss(gaps) if cfg.rank_loss == "bpr" else losses.hinge_loss(gaps, cfg.hinge_margin)
        terms["l2"] = encoder.l2(batch, j)
        terms["extra"] = encoder.extra_loss(batch, layers)
        total = terms.get("anchor", 0.0) + cfg.lambda_cl * terms.get("cl", 0.0)
        total = total + terms["rank"] + cfg.lambda_reg * terms["l2"] + cfg.lambda_extra * terms["extra"]
        terms["neg_percentile"] = samplers.percentile(e_u, e_minus, item_emb)
        return total, terms

    schedule = ("lr", "batch_size", "n_epochs", "patience", "eval_every", "checkpoint_every")
    options = {"seed": run.seed, "n_threads": run.n_threads, "checkpoint": run.out / "checkpoint.safetensors"}
    options |= {name: getattr(cfg, name) for name in schedule}
    done = training.fit(model, batch_loss, sampler.draw, pairs, train, prep.valid, **options)

    user_emb, item_emb = recommender.embeddings(encoder)
    save_npy(run.out / "user.npy", user_emb)
    save_npy(run.out / "item.npy", item_emb)
    negatives = training.negatives_of(encoder, sampler, pairs, run.seed, cfg.batch_size)
    save_npy(run.out / "negatives.npy", negatives)
    if refused := samplers.n_refused(negatives, blocked):
        say(f"{refused:,} of {len(negatives):,} negatives are refused by the guard: no candidate of their row passes")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, run.out / "model.safetensors")
    save_jsonl(run.out / "log.jsonl", done.log)
    seconds = float(np.mean(done.epoch_seconds))
    score = done.best_score if prep.valid.nnz else None
    told = "nothing to validate on" if score is None else f"validation {score:.4f}"
    say(f"best epoch {done.best_epoch} of {done.epoch}: {told}, {seconds:.2f} s an epoch")
    return {
        "counts": {
            "training pairs": len(pairs),
            "pairs skipped, no negative left": train.nnz - len(pairs),
            "negatives that the guard refuses, for want of others": refused,
            "pairs with a generated negative": int((generated.row_of >= 0).sum()) if generated else 0,
            "epochs": done.epoch,
            "best epoch": done.best_epoch,
            "valid ndcg@20": score,
        },
        "timing": {"epoch_seconds": done.epoch_seconds, "seconds_per_epoch": seconds},
    }


command = StageCommand("train", TrainConfig, main, reads, lambda cfg: [cfg.generate_dir] if cfg.generate_dir else [])
if __name__ == "__main__":
    command()

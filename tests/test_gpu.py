"""What a GPU computes is what a CPU computes, but for the order of its sums. Skipped where torch finds no GPU."""

import importlib.util

import numpy as np
import pytest
import torch
import transformers

from hnlm_ref import llm, losses, recommender, training
from hnlm_ref.artifacts import Run, load_json, load_npy

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")

CF = [np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32) for n in (3, 5)]
ROWS = [(list(range(2, 20 + u)), [[30 + i, -1 - u, -4 - i, 1] for i in range(u + 1)]) for u in range(3)]
PAIRS = torch.tensor([(u, i) for u in range(3) for i in range(u + 1)])
TARGETS = torch.randn(2, len(PAIRS), 6, generator=torch.Generator().manual_seed(0))


def fill_lora(model):
    """Random B, which is zero in a fresh adapter."""
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)


def figures_and_gradients(model, device):
    u, i = PAIRS.T.to(device)
    return llm.gradients(
        model,
        lambda users: (model(llm.pack([ROWS[user] for user in users], device))[1],),
        [0, 1, 2],
        lambda o: {"objective": losses.sft_loss(o, *TARGETS.to(device), u, i, 0.05)},
        seed=0,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_vectors_and_gradients_in_float32(checkpointing):
    found = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)  # made on the CPU: the same weights on both
        model = llm.NegativeModel(llm.add_lora(llm.load_llm("tiny", "cpu")[0], 8, 16, 0.0), *CF, 6)
        fill_lora(model)
        model.to(device)
        if checkpointing:
            model.llm.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.no_grad():
            h = model(llm.pack(ROWS, device))[0]
        figures, gradients = figures_and_gradients(model.train(), device)
        found.append([h, figures["objective"], *gradients])
    for cpu, gpu in zip(*found, strict=True):
        assert gpu.device.type == DEVICE and cpu.abs().max() > 0
        torch.testing.assert_close(gpu.cpu(), cpu, atol=1e-4, rtol=1e-3)


def test_in_bfloat16_the_loss_falls():
    base = llm.load_llm("tiny", DEVICE, "bfloat16")[0]
    model = llm.NegativeModel(llm.add_lora(base, 8, 16, 0.05), *CF, 6).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser, seen = torch.optim.AdamW(trainable, lr=1e-2), []
    for _ in range(20):
        figures, gradients = figures_and_gradients(model, DEVICE)
        for p, gradient in zip(trainable, gradients, strict=True):
            p.grad = gradient
        optimiser.step()
        seen.append(figures["objective"].item())
    assert base.dtype == torch.bfloat16 and base.device.type == DEVICE
    assert seen[-1] < 0.7 * seen[0]


# No extra installs bitsandbytes: it is the user's choice, and wants a GPU.
@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_weights_in_4_bits_pass_gradients_and_load_again(tmp_path):
    config = llm.tiny_model()[0].config
    for name, size in {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}.items():
        setattr(config, name, size)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    llm.tiny_model()[1].save_pretrained(tmp_path / "base")

    def load():
        return llm.load_llm(str(tmp_path / "base"), DEVICE, "bfloat16", load_in_4bit=True)[0]

    base = load()
    assert base.get_decoder().layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    model = llm.NegativeModel(llm.add_lora(base, 8, 16, 0.0), *CF, 6).train()
    _, gradients = figures_and_gradients(model, DEVICE)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    reached = {name for name, gradient in zip(names, gradients, strict=True) if gradient.abs().max() > 0}
    assert reached == {name for name in names if "lora_A" not in name}  # lora_B is zero, so none of A's yet
    fill_lora(model)
    model.save(tmp_path)
    np.save(tmp_path / "targets.npy", np.zeros((1, 6), np.float32))
    again = llm.load_negative_model(load(), tmp_path, *CF)
    with torch.no_grad():
        h, expected = (m.eval()(llm.pack(ROWS, DEVICE))[0] for m in (again, model))
    torch.testing.assert_close(h, expected)


@pytest.mark.parametrize("backbone", ["mf", "lightgcn"])
def test_an_epoch_of_training(toy_run, backbone):
    prep, found = Run(toy_run).prep(), []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        encoder = recommender.ENCODERS[backbone](prep.train, 8, 2).to(device)
        sampler = training.Sampler("dns", prep.train)

        def batch_loss(batch, layers, encoder=encoder, sampler=sampler):
            user_emb, item_emb = encoder.split(layers)
            j, e_j = sampler.pick(batch, layers, user_emb, item_emb)
            rank = losses.bpr_loss(losses.score_gaps(user_emb[batch.users], item_emb[batch.items], e_j))
            return rank + 1e-4 * encoder.l2(batch, j), {}

        done = training.fit(
            torch.nn.ModuleDict({"encoder": encoder}), batch_loss, sampler.draw,
            training.trainable_pairs(prep.train), prep.train, prep.valid, seed=0, n_epochs=1, batch_size=256,
        )  # fmt: skip
        found.append((done.log[0], *recommender.embeddings(encoder)))
    assert found[1][0]["loss"] == pytest.approx(found[0][0]["loss"], rel=1e-4)
    for cpu, gpu in zip(found[0][1:], found[1][1:], strict=True):
        np.testing.assert_allclose(gpu, cpu, atol=2e-3)  # Adam's first steps have full length whatever the gradient


def test_the_whole_pipeline(toy_run, tmp_path, cli):
    """Scores come near the CPU's; they are not equal, as training carries the last digits on."""
    done = cli("all", "--preset", "toy", "--device", DEVICE, "--run-dir", tmp_path / "run", "--n-seeds", 1)
    assert done.returncode == 0, done.stderr
    folders = ("sft", "generate", "train/uniform/seed0", "train/hnlm/seed0")
    assert {Run(tmp_path / "run").manifest(folder)["device"] for folder in folders} == {DEVICE}
    scores = [load_json(run / "eval" / "metrics.json")["methods"] for run in (toy_run, tmp_path / "run")]
    for method in scores[1]:
        cpu, gpu = (run[method]["seed0"]["ndcg@20"] for run in scores)
        assert gpu == pytest.approx(cpu, abs=0.05)
    h = [load_npy(run / "generate" / "embeddings.npy") for run in (toy_run, tmp_path / "run")]
    assert h[0].shape == h[1].shape and np.isfinite(h[1]).all()

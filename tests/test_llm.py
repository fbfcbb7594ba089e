"""One way from a prompt to a vector, the same for every model family, tokenizer, padding and batch."""

import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from hnlm_ref import llm
from hnlm_ref.artifacts import load_json, save_json
from hnlm_ref.console import UserError
from hnlm_ref.profiles import AskConfig, ask_local
from hnlm_ref.prompts import QUERY_USER, fill

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")


def plain(model, ids: list[int], n_prefix: int, pooling: str) -> torch.Tensor:
    """The vector of one sequence as transformers alone gives it."""
    hidden = model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return hidden[-1] if pooling == "last" else hidden[n_prefix:].mean(0)


def test_many_texts_have_the_ids_and_vectors_of_each_alone():
    model, tokenizer = llm.tiny_model()
    texts = ("b" * (n % 7) + "a" for n in range(2_500))
    expected = [n % 7 + 1 for n in range(2_500)]
    ids = llm.encode(tokenizer, list(texts))
    assert list(map(len, ids)) == expected and all(row[-1] == ids[0][0] for row in ids)
    some = ["ab", "a", "bbb" * 30, "ab", ""]
    vectors = llm.text_vectors(model.eval(), tokenizer, some, batch_size=2)
    parts = [[*row[:64], 1] for row in llm.encode(tokenizer, some)]
    with torch.no_grad():
        alone = torch.stack([plain(model, [0, *part], 1, "mean") for part in parts])
    torch.testing.assert_close(torch.from_numpy(vectors), alone - alone.mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_vectors_are_those_of_each_sequence_alone(family, pooling):
    model, tokenizer = llm.tiny_model(family)
    model.eval()
    texts = llm.encode(tokenizer, ["a user part", "x", "a much longer continuation", ""])
    prefix, parts = [0, *texts[0]], [[*ids, 1] for ids in texts[1:]]
    rows = [(prefix, parts), ([0], parts[:1]), (prefix + prefix, parts[1:])]
    with torch.no_grad():
        packed = llm.embed(model, llm.pack(rows), pooling=pooling)  # [6, 32]
        alone = [plain(model, [*start, *part], len(start), pooling) for start, some in rows for part in some]
        one_by_one = [
            llm.embed(model, llm.pack([(start, [part])]), pooling=pooling) for start, some in rows for part in some
        ]
    assert torch.isfinite(packed).all()  # the empty text too (case D18)
    torch.testing.assert_close(packed, torch.stack(alone), atol=1e-5, rtol=0)  # case D04
    torch.testing.assert_close(torch.cat(one_by_one), torch.stack(alone), atol=1e-5, rtol=0)


def random_model(family: str, **knobs):
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
    config = transformers.AutoConfig.for_model(family, **small | knobs)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("family", "knobs", "targets"),
    [
        ("phi3", {"intermediate_size": 64, "num_key_value_heads": 4}, {"qkv_proj", "o_proj"}),
        ("gpt_neox", {"intermediate_size": 64}, {"query_key_value", "dense"}),
        ("gpt2", {"n_positions": 100}, {"c_attn", "c_proj"}),  # just enough
    ],
)
def test_attention_is_tuned_whatever_its_layers_are_called(family, knobs, targets):
    base = random_model(family, **knobs)
    llm.check_rows(family, base, 100)
    base.vision_attention = torch.nn.Linear(2, 2)  # of a model that sees too
    lora = llm.add_lora(base, 2, 6, 0.0)
    layers = [layer for layer in lora.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    assert {(layer.r["default"], layer.scaling["default"]) for layer in layers} == {(2, 6 / 2)}
    tuned = {name.partition(".lora_A")[0] for name, _ in lora.named_parameters() if "lora_A" in name}
    assert {name.rpartition(".")[2] for name in tuned} == targets and all("att" in name for name in tuned)
    llm.embed(lora, llm.pack([([2, 3], [[4, 5], [6]])]))[:, 0].sum().backward()
    moved = [p.grad for name, p in lora.named_parameters() if "lora_B" in name]
    assert len(moved) == 2 * len(targets) and all(grad is not None and grad.any() for grad in moved)


@pytest.mark.parametrize(
    ("family", "knobs", "why"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"], "initializer_range": 0.3, "num_key_value_heads": 4}, ""),
        ("mpt", {"initializer_range": 0.3}, "off"),  # takes positions from the place in the row
        ("bloom", {}, "bloom models cannot be used here .*Llama"),  # knows no mask of who sees whom
        ("xlm", {"emb_dim": 32, "n_layers": 2, "n_heads": 4}, "xlm models cannot be used here .*Llama"),
        ("gemma4_text", {"num_key_value_heads": 4, "head_dim": 8}, "input_ids"),  # takes no vector that is no word's
        ("mistral", {"sliding_window": 99, "num_key_value_heads": 4}, "sliding_window is 99, .* of 100 tokens"),
        ("gpt2", {"n_positions": 99}, "max_position_embeddings is 99, .* of 100 tokens"),
    ],
)
def test_models_whose_vectors_would_be_wrong_are_refused(family, knobs, why):
    with pytest.raises(UserError, match=f"--model here/it: .*{why}"):
        llm.check_rows("here/it", random_model(family, **knobs), 100)


@pytest.mark.parametrize("side", ["left", "right"])
def test_vectors_are_those_of_a_padded_batch_of_transformers_on_either_side(side):
    model, tokenizer = llm.tiny_model()
    model.eval()
    sequences = [[0, *ids, 1] for ids in llm.encode(tokenizer, ["a", "a long text " * 5])]
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side  # pad = EOS on purpose (case D05)
    padded = tokenizer.pad(
        {"input_ids": sequences, "attention_mask": [[1] * len(s) for s in sequences]}, return_tensors="pt"
    )
    position = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        hidden = model.get_decoder()(**padded, position_ids=position).last_hidden_state
        ours = llm.embed(model, llm.pack([([], [ids]) for ids in sequences]))
    last = [-1, -1] if side == "left" else [len(ids) - 1 for ids in sequences]
    torch.testing.assert_close(ours, hidden[torch.arange(2), last], atol=1e-5, rtol=0)


def test_packing_lays_positions_and_branches_as_drawn():
    batch = llm.pack([([5, 6], [[7], [8, 9]]), ([4], [[3]])])
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert batch.branch.tolist() == [[0, 0, 1, 2, 2], [0, 1, -1, -1, -1]]
    assert batch.position.tolist() == [[0, 1, 2, 2, 3], [0, 1, 0, 0, 0]]


def users_and_items(n_titles: int = 3) -> tuple[list[dict], list[dict]]:
    titles = ", ".join(f"History item number {n:03d} with a long name" for n in reversed(range(n_titles)))
    items = [{"title": "TARGET-KEEP-ME", "profile": "TARGET-KEEP-ME. " + "very " * 200}, {"title": "", "profile": ""}]
    return [{"profile": f"Lately took {titles}."}, {"profile": "</s><s>"}], items


@pytest.mark.parametrize("bos", [True, False])
def test_a_query_has_one_bos_if_any_one_eos_and_two_soft_tokens(bos):
    _, tokenizer = llm.tiny_model()
    if not bos:  # as in Qwen and GPT-2
        tokenizer.bos_token = None
    queries = llm.make_queries(tokenizer, *users_and_items(), 256, 64)
    prefix, parts = queries.row(1, [0, 1])
    for part in parts:
        ids = prefix + part
        assert (ids.count(0), ids.count(1), ids[-1]) == (int(bos), 1, 1)  # case D06
    assert None not in prefix
    assert [[n for n in part if n < 0] for part in parts] == [[-2, -3], [-2, -4]]  # users 0, 1 are -1, -2


def test_a_long_history_loses_its_oldest_items_and_nothing_else():
    _, tokenizer = llm.tiny_model()
    queries = llm.make_queries(tokenizer, *users_and_items(200), 192, 64)
    prefix, parts = queries.row(0, [0])
    assert len(prefix) == 192 and len(parts[0]) == 64  # case D03: 256 in all
    text = tokenizer.decode([n for n in prefix + parts[0] if n >= 0])
    assert fill(QUERY_USER, profile="") in text and "TARGET-KEEP-ME" in text and "Passed over:" in text
    assert "number 199" in text and "number 197" not in text
    assert queries.n_shortened == 2  # this user and this item


def test_limits_that_leave_no_room_are_refused_with_the_least_that_works():
    _, tokenizer = llm.tiny_model()
    with pytest.raises(UserError, match="least that works") as error:
        llm.make_queries(tokenizer, *users_and_items(), 20, 5)
    least = [int(word) for word in str(error.value).split() if word.isdigit()]
    llm.make_queries(tokenizer, *users_and_items(), *least)
    for too_few in ([least[0] - 1, least[1]], [least[0], least[1] - 1]):
        with pytest.raises(UserError, match=f"the least that works is {least[0]} and {least[1]}"):
            llm.make_queries(tokenizer, *users_and_items(), *too_few)


def test_a_part_of_just_its_limit_is_not_shortened():
    _, tokenizer = llm.tiny_model()
    told = [llm.encode(tokenizer, [text])[0] for text in ("\nTook: ab. c", "\nPassed over:")]
    user = len(llm.encode(tokenizer, [fill(QUERY_USER, profile="xyz")])[0]) + 1  # BOS
    room = sum(map(len, told)) + 3  # two soft tokens and EOS
    for short, limits in ((0, (user, room)), (1, (user - 1, room)), (1, (user, room - 1))):
        queries = llm.make_queries(tokenizer, [{"profile": "xyz"}], [{"title": "ab", "profile": "c"}], *limits)
        assert queries.n_shortened == short


def test_a_tokenizer_that_adds_tokens_of_its_own_adds_none_to_a_query():
    from tokenizers.processors import TemplateProcessing

    _, tokenizer = llm.tiny_model()
    plain = llm.make_queries(tokenizer, *users_and_items(), 256, 64)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tokenizer("a").input_ids[0] == 0  # as Llama's
    assert llm.make_queries(tokenizer, *users_and_items(), 256, 64) == plain


def test_a_chat_template_that_writes_bos_gives_one_bos():
    _, tokenizer = llm.tiny_model()
    hostile = "hi</s><s>"
    assert llm.chat_ids(tokenizer, hostile).count(0) == 1  # no template: ours
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if enable_thinking is false %}!{% endif %}{% if add_generation_prompt %} assistant: {% endif %}"
    )
    ids = llm.chat_ids(tokenizer, hostile)
    assert ids == [0, *llm.encode(tokenizer, [f"user: {hostile}! assistant: "])[0]]  # case D06


def test_a_chat_template_that_fails_is_one_sentence():
    _, tokenizer = llm.tiny_model()
    tokenizer.chat_template = "{{ raise_exception('a system message is wanted') }}"
    with pytest.raises(UserError, match="chat template fails on a single question: a system message is wanted; mend"):
        llm.chat_ids(tokenizer, "hi")


CF = np.random.default_rng(5).normal(size=(2, 2, 4)).astype(np.float32)  # of two users, of two items


def negative_model(seed: int = 0, n_out: int = 3, rank: int = 4, dropout: float = 0.0) -> llm.NegativeModel:
    base, _ = llm.load_llm("tiny", "cpu")
    torch.manual_seed(seed)
    return llm.NegativeModel(llm.add_lora(base, rank, 2 * rank, dropout), *CF, n_out)


def query_batch() -> llm.Batch:
    _, tokenizer = llm.tiny_model()
    queries = llm.make_queries(tokenizer, *users_and_items(), 160, 64)
    return llm.pack([queries.row(0, [0, 1]), queries.row(1, [1])])


def tune(model: llm.NegativeModel, n_steps: int) -> float:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(n_steps):
        llm.Dropout.of_thread.seed = step
        h, z = model(query_batch())
        loss = (z - 1).square().mean() + h.square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    return loss.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_soft_tokens_start_as_long_as_words(family):
    base, _ = llm.tiny_model(family)
    cf = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    model = llm.NegativeModel(base, 7 * cf, 0.1 * cf, 3)
    words = base.get_input_embeddings()(torch.arange(258)).norm(dim=1).mean().item()
    for soft in (model.user_projection(model.cf[:50]), model.item_projection(model.cf[50:])):
        assert soft.norm(dim=1).mean().item() / words == pytest.approx(1, abs=0.2)


def test_a_model_in_bfloat16_passes_by_the_tolerance_of_its_own_rounding():
    base, _ = llm.load_llm("tiny", "cpu", "bfloat16")
    assert base.dtype == torch.bfloat16
    llm.check_rows("tiny", base, 100)
    h = llm.embed(base, llm.pack([([2, -1], [[3]])]), torch.ones(1, 32))  # a soft token in float32
    assert h.dtype == torch.float32


def test_soft_tokens_put_each_users_and_items_own_vector_in():
    model = negative_model().eval()
    with torch.no_grad():
        before, _ = model(query_batch())
        model.cf[model.n_users + 1] += 1.0
        of_item, _ = model(query_batch())
        model.cf[1] += 1.0
        of_user, _ = model(query_batch())
    changed = [((a - b).abs().max(1).values > 1e-6).tolist() for a, b in ((before, of_item), (of_item, of_user))]
    assert changed == [[False, True, True], [False, False, True]]  # pairs (0, 0), (0, 1), (1, 1)


def test_a_saved_model_gives_its_vectors_again_in_a_new_process_and_in_plain_peft(tmp_path):
    model = negative_model()
    with torch.no_grad():
        untuned, _ = model.eval()(query_batch())
    tune(model, 5)
    model.save(tmp_path)
    own = {name.partition(".")[0] for name in llm.load_file(tmp_path / "projections.safetensors")}
    assert own == {"user_projection", "item_projection", "head"}  # and not the whole model
    np.save(tmp_path / "targets.npy", np.zeros((1, 3), np.float32))  # the head is as wide as the stage's targets
    with torch.no_grad():
        tuned, z = model(query_batch())
    assert (tuned - untuned).abs().max() > 1e-3
    # case D07: another process, from the files alone
    script = (
        "import sys, numpy as np, torch; sys.path.insert(0, sys.argv[2]); import test_llm as t\n"
        "from pathlib import Path; from hnlm_ref import llm\n"
        "base, _ = llm.load_llm('tiny', 'cpu'); model = llm.load_negative_model(base, Path(sys.argv[1]), *t.CF)\n"
        "with torch.no_grad(): np.save(sys.argv[1] + '/again.npy', torch.cat(model(t.query_batch()), 1).numpy())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path, Path(__file__).parent], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "again.npy"), torch.cat([tuned, z], 1), atol=1e-6)
    # and PEFT alone reads the adapter
    base, tokenizer = llm.load_llm("tiny", "cpu")
    ids = [0, *llm.encode(tokenizer, ["some text"])[0], 1]
    with torch.no_grad():
        ours = llm.embed(model.llm, llm.pack([([], [ids])]))[0]
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(plain(theirs.base_model, ids, 0, "last"), ours, atol=1e-6, rtol=0)


def test_an_adapter_that_is_absent_or_of_another_shape_is_an_error(tmp_path):
    base, _ = llm.load_llm("tiny", "cpu")
    with pytest.raises(UserError, match="no PEFT adapter of this model: Can't find"):
        llm.load_lora(base, tmp_path / "no" / "such" / "dir")  # case D08
    negative_model().save(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = llm.load_file(file)
    llm.save_file(dict(list(weights.items())[1:]), file)
    with pytest.raises(UserError, match="1 of its weights are missing or unknown"):
        llm.load_lora(llm.load_llm("tiny", "cpu")[0], tmp_path / "adapter")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="no PEFT adapter of this model"):
        llm.load_lora(llm.load_llm("tiny", "cpu")[0], tmp_path / "adapter")


def gradients_of(model: llm.NegativeModel, seed: int = 0) -> tuple[dict, dict[str, torch.Tensor]]:
    """As a tuning step has them, of three users with three, one and one pair."""
    _, tokenizer = llm.tiny_model()
    queries = llm.make_queries(tokenizer, *users_and_items(), 160, 64)
    rows = [queries.row(0, [0, 1, 1]), queries.row(1, [1]), queries.row(0, [0])]
    items = [torch.tensor([0, 1, 1]), torch.tensor([1]), torch.tensor([0])]

    def read(users: list[int]) -> tuple:
        return model(llm.pack([rows[u] for u in users]))[1], torch.cat([items[u] for u in users])

    def loss(z: torch.Tensor, item: torch.Tensor) -> dict:  # every pair's loss depends on every pair's vector
        return {"objective": ((z @ z.T).softmax(1) * (item + 1)).square().sum(), "n": torch.tensor(len(z))}

    figures, found = llm.gradients(model, read, [0, 1, 2], loss, seed)
    return figures, dict(zip((n for n, p in model.named_parameters() if p.requires_grad), found, strict=True))


@pytest.mark.parametrize("apart", [False, True])
def test_gradients_are_those_of_one_backward_pass_over_all_pairs(monkeypatch, apart):
    model = negative_model()
    tune(model, 1)  # lora_B leaves zero, so that lora_A gets a gradient
    monkeypatch.setattr(llm, "sums_vary", lambda llm: apart)
    figures, found = gradients_of(model)
    _, tokenizer = llm.tiny_model()
    queries = llm.make_queries(tokenizer, *users_and_items(), 160, 64)
    z = model(llm.pack([queries.row(0, [0, 1, 1]), queries.row(1, [1]), queries.row(0, [0])]))[1]
    objective = ((z @ z.T).softmax(1) * torch.tensor([1, 2, 2, 2, 1])).square().sum()
    objective.backward()
    assert figures["objective"].item() == pytest.approx(objective.item(), rel=1e-5) and figures["n"] == 5
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.any(), name
            torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_do_not_depend_on_the_number_of_threads(tmp_path, attention):
    """In float32, of rows long enough for torch to share them out; only eager attention differs, backwards."""
    for part in llm.tiny_model():
        part.save_pretrained(tmp_path)
    rows = [(list(range(2, 62)), [[*range(5 + i, 23 + i), -1 - u, -3, 1] for i in range(5)]) for u in (0, 1, 0, 1)]
    found, before = [], torch.get_num_threads()
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            torch.manual_seed(0)
            base, _ = llm.load_llm(str(tmp_path), "cpu", "float32", attention)
            assert base.config._attn_implementation == attention
            model = llm.NegativeModel(llm.add_lora(base, 4, 8, 0.0), *CF, 3).train()
            for name, weight in model.named_parameters():
                if "lora_B" in name:  # zero else, and lora_A would get no gradient
                    torch.nn.init.normal_(weight, std=0.1)
            read = lambda users, model=model: (model(llm.pack([rows[u] for u in users]))[1],)  # noqa: E731
            found.append(llm.gradients(model, read, [0, 1, 2, 3], lambda o: {"objective": o.square().sum()}, 0)[1])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) and one.any() for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(("dropout", "apart"), [(0.0, False), (0.5, False), (0.5, True)])
def test_recomputing_activations_changes_no_gradient_and_reaches_every_layer(monkeypatch, dropout, apart):
    monkeypatch.setattr(llm, "sums_vary", lambda llm: apart)
    gradients = []
    for recompute in (False, True):
        model = negative_model(dropout=dropout)
        tune(model, 1)  # lora_B leaves zero, so that lora_A gets a gradient
        if recompute:
            model.llm.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        gradients.append(gradients_of(model)[1])
    for name, gradient in gradients[0].items():
        assert gradient.norm() > 0, name  # case D10
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-4)


def test_dropout_follows_from_seed_and_layer_and_keeps_the_expected_sum():
    x, (first, second) = torch.ones(100, 100), (llm.Dropout(0.2, number) for number in (0, 1))
    draws = []
    for seed, layer in ((1, first), (1, second), (2, first), (1, first)):
        llm.Dropout.of_thread.seed = seed
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[3]) and not any(torch.equal(draws[0], other) for other in draws[1:3])
    for drawn in draws:
        assert drawn.unique().tolist() == [0, 1.25]
        assert drawn.mean().item() == pytest.approx(1, abs=0.025)  # five deviations of 10,000 draws
    assert torch.equal(first.eval()(x), x)


def test_lora_alone_drops_out_and_each_of_its_layers_by_itself(tmp_path):
    random_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5, vocab_size=258).save_pretrained(tmp_path)
    llm.tiny_model()[1].save_pretrained(tmp_path)
    base, _ = llm.load_llm(str(tmp_path), "cpu")
    batch = llm.pack([([2, 3], [[4, 5], [6]])])
    assert torch.equal(llm.embed(base.train(), batch), llm.embed(base.eval(), batch))
    lora = llm.add_lora(base, 2, 4, 0.1)
    own = [layer for layer in lora.modules() if isinstance(layer, llm.Dropout)]
    assert [layer.number for layer in own] == [0, 1, 2, 3] and {layer.p for layer in own} == {0.1}
    assert not any(type(layer) is torch.nn.Dropout and layer.p for layer in lora.modules())


def test_pieces_of_a_micro_batch_and_its_seeds_drop_out_each_by_itself(monkeypatch):
    """Four users with the same prompt, two to a thread."""
    monkeypatch.setattr(llm, "sums_vary", lambda llm: True)
    model = negative_model(dropout=0.5).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero else, and nothing is dropped
            torch.nn.init.normal_(weight)
    row, seen = ([2, 3, 4], [[5, -1, -3, 1]]), []

    def loss(z):
        seen.append(z.detach())
        return {"objective": z.sum()}

    for seed in (0, 0, 1):
        llm.gradients(model, lambda users: (model(llm.pack([row] * len(users)))[1],), [0, 1, 2, 3], loss, seed)
    first, again, other = seen
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[:2], first[2:])


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    model, tokenizer = llm.tiny_model()
    tokenizer.eos_token = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokenizer names no eos_token; write one"):
        llm.load_llm(str(tmp_path), "cpu")


def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused_unless_it_is_an_added_pad_token(tmp_path):
    model, tokenizer = llm.tiny_model()  # of 258 tokens each
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    assert tokenizer.pad_token_id == 258
    model, tokenizer = llm.load_llm(str(tmp_path), "cpu")
    assert tokenizer.pad_token_id == model.config.pad_token_id == 1
    questions = [llm.chat_ids(tokenizer, text) for text in ("a question", "another one")]  # the first is padded
    assert len(llm.generate_texts(model, tokenizer, questions, 2)) == 2
    model.resize_token_embeddings(200)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its tokenizer has 258 tokens, its weights know 200; take the model with its"):
        llm.load_llm(str(tmp_path), "cpu")


def test_answers_are_greedy_whatever_the_model_s_own_settings_say(tmp_path):
    model, tokenizer = llm.tiny_model()
    tokenizer.save_pretrained(tmp_path)
    found = []
    for settings_ in ({}, {"num_beams": 3, "no_repeat_ngram_size": 1, "repetition_penalty": 9.0, "do_sample": True}):
        model.generation_config = transformers.GenerationConfig(eos_token_id=1, **settings_)
        model.save_pretrained(tmp_path)
        base, tokenizer = llm.load_llm(str(tmp_path), "cpu")
        found.append(llm.generate_texts(base, tokenizer, [[5, 6, 7]], 12))
    assert found[0] == found[1] and len(found[0][0]) > 3
    model.generation_config = transformers.GenerationConfig(eos_token_id=[*range(258)])  # whatever it says is the end
    model.save_pretrained(tmp_path)
    (text,) = llm.generate_texts(*llm.load_llm(str(tmp_path), "cpu"), [[5, 6, 7]], 12)
    assert len(text) <= 1


def test_a_layer_that_keeps_to_places_in_the_row_is_refused():
    """GPT-Neo's local layers see 256 places back: of a long row not the user's part."""
    base = random_model("gpt_neo", attention_types=[[["global", "local"], 1]], attn_implementation="eager")
    with pytest.raises(UserError, match="continuations that share a prefix are off by"):
        llm.check_rows("neo", base, 100)


def test_ridge_puts_the_head_where_least_squares_does():
    head, generator = llm.Head(6, 2), torch.Generator().manual_seed(0)
    h = torch.randn(400, 6, generator=generator) * torch.tensor([1.0, 2, 3, 4, 5, 6]) + 7
    wanted = h[:, :2] @ torch.tensor([[1.0, 2], [3, 4]]) + 0.5
    torch.testing.assert_close(head(h), head.linear(h))  # nothing is known of h yet
    head.solve(h, wanted, ridge=0.0)
    factor = (head(h) / wanted).median()
    torch.testing.assert_close(head(h), wanted * factor, atol=1e-3, rtol=1e-3)
    assert head.linear.weight.std().item() == pytest.approx((3 * 6) ** -0.5, rel=1e-3)
    h[:, 1] += 2 * h[:, 0]  # ridge is least squares with one more row per coordinate
    x = ((h - h.mean(0)) / h.std(0)).double().numpy()
    rows = np.concatenate([x, np.sqrt(0.5 * len(x)) * np.eye(6)])
    answers = np.concatenate([(wanted - wanted.mean(0)).numpy(), np.zeros((6, 2))])
    expected = np.linalg.lstsq(rows, answers, rcond=None)[0].T
    head.solve(h, wanted, ridge=0.5)
    weight = head.linear.weight.detach().numpy()
    np.testing.assert_allclose(weight / weight[0, 0], expected / expected[0, 0], rtol=1e-3, atol=1e-4)
    head.solve(h, wanted, ridge=1e9)  # all shrinks away but the mean
    mean = torch.nn.functional.normalize(wanted.mean(0), dim=0)
    torch.testing.assert_close(torch.nn.functional.normalize(head(h), dim=1), mean.expand(400, 2), atol=1e-3, rtol=0)


def test_whitened_directions_have_variance_one_and_no_correlation():
    x = np.random.default_rng(0).normal(size=(50, 5)) @ np.random.default_rng(1).normal(size=(5, 9))  # of rank 5
    for n_directions, n in ((3, 3), (512, 5)):
        white = llm.whiten((x - x.mean(0)).astype(np.float32), n_directions)
        assert white.shape == (50, n)
        np.testing.assert_allclose(white.T @ white / 50, np.eye(n), atol=1e-5)


def test_the_size_of_the_weights_is_told_from_the_configuration():
    # Two embeddings of 2^20 tokens by 512 and a norm of 512: 2^30 + 512 weights.
    config = transformers.LlamaConfig(vocab_size=1 << 20, hidden_size=512, num_hidden_layers=0)
    told = [llm.memory_estimate(config, dtype, dtype == torch.int8) for dtype in (torch.float32, torch.int8)]
    assert told[0] == "1,074 M parameters, about 4.00 GiB of weights in float32"
    assert told[1] == "1,074 M parameters, about 0.55 GiB of weights in 4-bit"


@pytest.mark.parametrize(
    ("name", "device", "able", "chosen"),
    [
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float32),
        ("auto", "cpu", True, torch.bfloat16),
        ("auto", "cpu", False, torch.float32),
        ("bfloat16", "cpu", False, torch.bfloat16),
        ("float32", "cpu", True, torch.float32),
        ("float32", "cuda", True, torch.float32),
    ],
)
def test_auto_is_bfloat16_only_where_the_gpu_or_the_cpu_multiplies_in_it(monkeypatch, name, device, able, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: able and device == "cuda")
    monkeypatch.setattr(llm, "bfloat16_pays", lambda: able and device == "cpu")
    assert llm.choose_dtype(name, device) == chosen
    if name == "auto":  # the toy's numbers are those of any machine
        assert llm.load_llm("tiny", "cpu")[0].dtype == torch.float32


@pytest.mark.parametrize(("times", "pays"), [((1, 3), True), ((1, 2), False), ((3, 1), False)])
def test_bfloat16_pays_where_the_best_of_its_products_takes_less_than_half_the_time(monkeypatch, times, pays):
    seen = iter(times)
    monkeypatch.setattr(llm.timeit, "repeat", lambda product, **_: [9, next(seen) if product().all() else 0, 9])
    assert llm.bfloat16_pays.__wrapped__() is pays


# ---- threads ----------------------------------------------------------------------------------------------------


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_batches_run_side_by_side_on_a_thread_each_and_come_back_in_order(three_threads):
    all_at_work, seen = threading.Barrier(3), []

    def read(number: int) -> int:
        all_at_work.wait(timeout=30)  # passes only if three batches are in work at once
        seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
        return number * number

    assert list(llm.in_parallel(read, range(6), "cpu")) == [0, 1, 4, 9, 16, 25]
    assert {n for _, n, _ in seen} == {1} and not any(grad for *_, grad in seen)
    assert len({ident for ident, *_ in seen} - {threading.get_ident()}) == 3
    assert torch.get_num_threads() == 3 and torch.is_grad_enabled()


@pytest.mark.parametrize(("device", "sharded"), [("cuda", False), ("cpu", True)])
def test_batches_follow_one_another_on_a_gpu_and_where_processes_share_the_weights(monkeypatch, device, sharded):
    monkeypatch.setattr(llm, "sharded", lambda: sharded)
    seen = list(llm.in_parallel(lambda n: (n, threading.get_ident(), torch.is_grad_enabled()), "ab", device))
    assert seen == [(n, threading.get_ident(), False) for n in "ab"]


def test_a_batch_that_fails_ends_the_work_and_leaves_the_threads_as_they_were(three_threads):
    begun = []

    def read(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise MemoryError("number 1")
        threading.Event().wait(0.05)

    with pytest.raises(MemoryError, match="number 1"):
        list(llm.in_parallel(read, range(100), "cpu"))
    assert len(begun) < 20 and torch.get_num_threads() == 3


def test_in_bfloat16_vectors_and_gradients_have_the_same_bits_for_any_number_of_threads(three_threads):
    """Sizes at which oneDNN shares a product out: with two threads on one batch the bits would differ."""
    found = []
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 2}
    rows = [(list(range(2, 50)), [[5, 6, 7] * 6] * 16)] * 3
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        lora = llm.add_lora(random_model("llama", **sizes).bfloat16(), 8, 16, 0.1)
        model = llm.NegativeModel(lora, *CF, 3)
        read = partial(llm.embed, lora.eval())
        h = torch.cat([*llm.in_parallel(read, [llm.pack(rows), llm.pack(rows[:2])], "cpu")])
        lora.train()
        _, gradients = llm.gradients(
            model, lambda users, lora=lora: (llm.embed(lora, llm.pack([rows[u] for u in users])),),
            [0, 1, 2], lambda h: {"objective": h.square().sum()}, 0,
        )  # fmt: skip
        found.append(torch.cat([h.flatten(), *(gradient.flatten() for gradient in gradients)]))
    assert torch.equal(*found) and found[0].isfinite().all()


def test_a_loaded_adapter_is_added_to_the_weights_in_float32_alone(tmp_path):
    tuned = negative_model()
    tune(tuned, 5)
    tuned.save(tmp_path)
    np.save(tmp_path / "targets.npy", np.zeros((1, 3), np.float32))
    merged = {}
    for dtype in ("float32", "bfloat16"):
        model = llm.load_negative_model(llm.load_llm("tiny", "cpu", dtype)[0], tmp_path, *CF)
        merged[dtype] = {layer.merged for layer in model.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
    assert merged == {"float32": {True}, "bfloat16": {False}}


def save_tiny(folder: Path) -> None:
    model, tokenizer = llm.tiny_model()
    tokenizer.pad_token = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_model_folder_loads_offline_without_a_pad_token_and_says_its_size(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # case D14
    save_tiny(tmp_path)
    model, tokenizer = llm.load_llm(str(tmp_path), "cpu")
    n = sum(p.numel() for p in model.parameters())
    assert f"{n / 1e6:,.0f} M parameters" in capsys.readouterr().err
    assert tokenizer.pad_token_id == model.config.pad_token_id == 1  # case D05
    assert not any(p.requires_grad for p in model.parameters())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        llm.load_llm(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"num_hidden_layers": 3, "layer_types": None}, r"9 weights .* for example model\.layers\.2\.input_layernorm"),
        ({"vocab_size": 300}, r"2 weights .* another shape, for example lm_head\.weight"),
        ({"model_type": "unheard"}, "model type `unheard`"),
        ({}, "deserializing"),  # cut off
    ],
)
def test_a_model_folder_that_does_not_fit_together_is_refused(tmp_path, knobs, message):
    save_tiny(tmp_path)
    file = tmp_path / "model.safetensors"
    save_json(tmp_path / "config.json", load_json(tmp_path / "config.json") | knobs)
    if not knobs:
        file.write_bytes(file.read_bytes()[:-99])
    with pytest.raises(UserError, match=f"--model {tmp_path}: .*{message}"):
        llm.load_llm(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    "name", ["no/such/folder", "nowhere.gguf", "package:hnlm_ref/none.gguf", "package:no_such_pkg/x"]
)
def test_a_model_that_is_not_there_is_named(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="no"):
        llm.load_llm(name, "cpu")


@pytest.mark.parametrize(("name", "device"), [("tiny", "cuda"), ("any.gguf", "cuda"), ("any", "cpu")])
def test_weights_in_4_bits_are_refused_where_they_would_not_be_tuned_or_not_be_4_bits(name, device):
    with pytest.raises(UserError, match=rf"--load-in-4bit needs a GPU, .* the model is {name}, on {device}"):
        llm.load_llm(name, device, load_in_4bit=True)


def test_generated_texts_do_not_depend_on_the_batch():
    base, tokenizer = llm.load_llm("tiny", "cpu")
    prompts = [llm.chat_ids(tokenizer, text) for text in ("a", "a longer question", "b")]
    together = llm.generate_texts(base, tokenizer, prompts, 8)
    assert together == [llm.generate_texts(base, tokenizer, [ids], 8)[0] for ids in prompts]
    expected = base.generate(torch.tensor([prompts[0]]), max_new_tokens=8, do_sample=False)[0, len(prompts[0]) :]
    assert together[0] == tokenizer.decode(expected, skip_special_tokens=True)
    base.config.max_position_embeddings = 20
    with pytest.raises(UserError, match=r"a question of 13 tokens and max_new_tokens 8 are more than the 20 places"):
        list(ask_local(base, tokenizer, AskConfig(max_new_tokens=8), ["a", "a question w", "b"]))


def test_a_whole_run_prints_its_own_lines_to_stderr_and_no_library_warns(toy_run):
    lines = (toy_run.parent / "stderr").read_text(encoding="utf-8").splitlines()
    own = ("$ python ", "[", "best epoch ", "generated negatives for ")
    assert len(lines) > 20 and [line for line in lines if not line.startswith(own)] == []  # case D16

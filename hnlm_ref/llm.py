"""The language model: loading, LoRA, soft tokens, and the one `embed` that tuning and generation share.

Letters: R rows of a batch, L tokens of the longest row, P pairs of a batch, d_llm, d_cf widths of hidden states and
collaborative vectors.

A *row* is one prefix with several continuations, packed into one sequence:

    user part u | item part i1 | item part i2 | ...        what each token may see: the user part, and its own part

A continuation sees the prefix and itself, and its positions go on from the prefix, so its vector is the one that
prefix + continuation alone would give, while the prefix is computed (and in tuning differentiated) once.
"""

import contextlib
import functools
import io
import os
import threading
import timeit
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before the import: no fork warnings (case D16)

import accelerate
import jinja2
import numpy as np
import peft
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hnlm_ref.artifacts import load_json, load_npy, resolve_path, save_json, whole
from hnlm_ref.console import UserError, progress, say
from hnlm_ref.losses import one_thread, products_vary
from hnlm_ref.prompts import QUERY_END, QUERY_ITEM, QUERY_USER, fill, item_words

TEXT_TOKENS = 64  # of a text that are read for its vector

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
warnings.filterwarnings("ignore", message="fan_in_fan_out", module="peft")  # of GPT-2's layers, and set right by PEFT
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ---- threads ----------------------------------------------------------------------------------------------------


def cut(work: Sequence, size: int) -> list:
    """The work in pieces of `size`, in order; the last may be shorter."""
    return [work[start : start + size] for start in range(0, len(work), size)]


def in_parallel(function: Callable, batches: Iterable, device: str) -> Iterator:
    """`function` of each batch, without gradients, in their order; nothing random may happen in it.

    On a CPU every batch is one thread's, so a result is the same for any number of threads, also in bfloat16, and
    two threads with a batch each are faster than two that share one.
    """

    def call(batch: Any) -> Any:
        with torch.no_grad():  # not inference mode: the tensors FSDP makes in it could not be tuned with later
            return function(batch)

    if device != "cpu" or sharded():  # processes that share weights have to ask for them in one order
        yield from map(call, batches)
        return
    n_threads = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(call, batches)


def sums_vary(llm: Any) -> bool:
    """Whether the sums of a model's gradients depend on how many threads share them.

    On a CPU those of bfloat16 do, those of eager attention, through its softmax, and all where products in float32 do.
    """
    eager = llm.config._attn_implementation == "eager"
    return llm.device.type == "cpu" and (llm.dtype == torch.bfloat16 or eager or products_vary())


# ---- loading ----------------------------------------------------------------------------------------------------


def tiny_model(family: str = "llama") -> tuple[Any, Any]:
    """A random two-layer model and a byte-level tokenizer, both made here: the real code path, nothing to download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    config = transformers.AutoConfig.for_model(
        family, vocab_size=len(alphabet), hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), fast


@functools.cache
def bfloat16_pays() -> bool:
    """Whether this CPU multiplies in bfloat16 at least twice as fast as in float32; best of five products each.

    Those with AMX do (SmolLM2 reads prompts there twice as fast, and tunes as well) and AMD's with AVX-512 (reads three
    times, tunes twice as fast). On Intel's the instructions of AVX-512 alone are slower than float32.
    """

    def seconds(dtype: torch.dtype) -> float:
        x, weight = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        return min(timeit.repeat(lambda: nn.functional.linear(x, weight), number=1, repeat=5))

    with one_thread():
        return 2 * seconds(torch.bfloat16) < seconds(torch.float32)


def choose_dtype(name: str, device: str) -> torch.dtype:
    """ "auto": bfloat16 where the GPU has it or on the CPU it pays, else float32; never float16: it overflows (D12)."""
    if name != "auto":
        return getattr(torch, name)
    pays = torch.cuda.is_bf16_supported() if device == "cuda" else bfloat16_pays()
    return torch.bfloat16 if pays else torch.float32


def load_llm(name: str, device: str, dtype: str = "auto", attention: str = "sdpa", load_in_4bit: bool = False) -> Any:
    """Load a causal language model and its tokenizer, saying first how much memory the weights will take.

    name  "tiny", a folder, a hub id, a .gguf file, or package:NAME/path of one of these.
    A GGUF file is unpacked to dense weights: it saves disk, not memory (case D15).
    Returns (model, tokenizer), the model in eval mode on `device`, frozen; the tokenizer has a pad token (case D05).
    Raises UserError when there is no such model; with HF_HUB_OFFLINE=1 no network is tried (case D14).
    """
    if load_in_4bit and (device != "cuda" or sharded() or name == "tiny" or name.endswith(".gguf")):
        # On a CPU bitsandbytes packs the weights at the first look at held-out triplets, and no gradient passes after.
        wanted = "a GPU, a folder or hub id for a model, and no --use_fsdp"
        raise UserError(f"--load-in-4bit needs {wanted}; the model is {name}, on {device}; tune without it")
    if name == "tiny":
        model, tokenizer = tiny_model()
        # In float32 the toy's numbers are those of any machine.
        return _placed(model if dtype == "auto" else model.to(choose_dtype(dtype, device)), device), tokenizer
    path = resolve_path(name)
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    where = str(path.parent if gguf else path)
    options: dict[str, Any] = {"dtype": choose_dtype(dtype, device), "attn_implementation": attention}
    if sharded():
        # "true", accelerate's default, has the first process alone read the file, for a wrapping that is not used here.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if load_in_4bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=options["dtype"]
        )
    elif gguf:
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        config = transformers.AutoConfig.from_pretrained(where, **gguf)
        for field, value in list(vars(text := config.get_text_config()).items()):
            if "drop" in field and isinstance(value, float):
                setattr(text, field, 0.0)  # Choice: only LoRA has dropout, see `Dropout`
        options["config"] = config
        say(f"model {name}: {memory_estimate(config, options['dtype'], load_in_4bit)}, {device}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **gguf)
        with contextlib.redirect_stderr(io.StringIO()):  # the bar of a GGUF file has no switch of its own
            load: Any = transformers.AutoModelForCausalLM.from_pretrained
            model, told = load(where, **gguf, **options, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model {name}: not a folder, hub id or .gguf file that can be loaded ({reason})") from error
    if random := {*told["missing_keys"], *(weight for weight, *_ in told["mismatched_keys"])}:  # put there in silence
        what = f"{len(random)} weights are missing or of another shape, for example {min(random)}"
        raise UserError(f"--model {name}: {what}; get the whole model again")
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {name}: its tokenizer names no eos_token; write one into tokenizer_config.json")
    if tokenizer.vocab_size > (n_known := model.get_input_embeddings().num_embeddings):
        told = f"its tokenizer has {tokenizer.vocab_size} tokens, its weights know {n_known}"
        raise UserError(f"--model {name}: {told}; take the model with its own tokenizer")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= n_known:  # one added that the weights do not know
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    ends = model.generation_config.eos_token_id  # all that is kept: answers are greedy, whatever else it asks for
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends)
    return _placed(model, device), tokenizer


def sharded() -> bool:
    """Whether the processes share the frozen weights: `accelerate launch --use_fsdp` says so by that variable."""
    return accelerate.utils.parse_flag_from_env("ACCELERATE_USE_FSDP") and torch.distributed.is_initialized()


def _placed(llm: Any, device: str) -> Any:
    """The model in eval mode on `device`, frozen; under FSDP every process holds a share of each decoder layer.

    Choice: embeddings and all that tuning adds stay whole in every process. They are small beside the layers, and
    adapter, optimiser and checkpoints are then those of one process.
    """
    llm.eval().requires_grad_(False)
    if sharded():
        from torch.distributed.fsdp import fully_shard

        decoder, embeddings = llm.get_decoder(), set(llm.get_input_embeddings().parameters())
        mesh = torch.distributed.init_device_mesh(device, (torch.distributed.get_world_size(),))
        for part in (*decoder.layers, decoder):
            fully_shard(part, mesh=mesh, ignored_params=embeddings)  # which moves it to the device
    return llm.to(device)


def memory_estimate(config: Any, dtype: torch.dtype, load_in_4bit: bool = False) -> str:
    """Size of the weights, from the configuration alone."""
    with torch.device("meta"):
        shell = transformers.AutoModelForCausalLM.from_config(config)
    n = shell.num_parameters()
    size = n * (0.55 if load_in_4bit else dtype.itemsize)
    kind = "4-bit" if load_in_4bit else str(dtype).removeprefix("torch.")
    return f"{n / 1e6:,.0f} M parameters, about {size / 2**30:.2f} GiB of weights in {kind}"


@torch.no_grad()
def check_rows(name: str, llm: Any, longest: int) -> None:
    """Refuse a model that does not give a continuation in a row the vector that it has alone.

    Recurrent and convolutional layers pass a continuation on to the next one, and some models take their positions
    from the place in the row: their vectors would be wrong, and nothing else would tell. So would those of a prompt,
    of at most `longest` tokens, that is longer than a sliding window: the mask of `embed` is that of full attention.
    """
    for knob in ("max_position_embeddings", "sliding_window"):
        if (room := getattr(llm.config.get_text_config(), knob, None)) and longest > room:
            wanted = f"max_user_tokens and max_item_tokens allow prompts of {longest} tokens; lower them"
            raise UserError(f"--model {name}: its {knob} is {room}, but {wanted}")
    embedding, kind = llm.get_input_embeddings(), llm.config.model_type
    device, ids = embedding.weight.device, np.linspace(2, embedding.num_embeddings - 1, 20).astype(int)
    prefix, *parts = (piece.tolist() for piece in np.split(ids, (6, 12, 15)))
    others = 60 * [parts[-1]]  # windows and places that a layer keeps to itself show in a long row
    try:
        soft = embedding.weight[:2].mean(0, keepdim=True)  # [1, d_llm], no word's embedding
        together = embed(llm, pack([([*prefix, -1], [*others, *parts])], device), soft)[-len(parts) :]
        alone = torch.cat([embed(llm, pack([([*prefix, -1], [part])], device), soft) for part in parts])  # [3, d_llm]
        off = float((together - alone).norm() / (alone - alone.mean(0)).norm())
        if not off < (1e-3 if llm.dtype == torch.float32 else 0.2):
            raise ValueError(f"vectors of continuations that share a prefix are off by {off:.1%}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each kind fails in its own way: XLM asserts
        told = f"{kind} models cannot be used here ({(str(error) or repr(error)).splitlines()[0]})"
        raise UserError(f"--model {name}: {told}; take a Llama, Qwen, Gemma ...") from error


class Dropout(nn.Dropout):
    """Dropout whose masks follow from the seed that `gradients` sets and the module's number alone.

    torch's own come from one stream of the process: of threads at work side by side each would get what is left.
    """

    of_thread = threading.local()

    def __init__(self, p: float, number: int):
        super().__init__(p)
        self.number = number

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        stream = torch.Generator(input.device).manual_seed(hash((self.of_thread.seed, self.number)))
        kept = torch.rand(input.shape, generator=stream, device=input.device).ge_(self.p).div_(1 - self.p)
        return input * kept


def _with_own_dropout(lora: Any) -> Any:
    layers = {n: layer for n, layer in lora.named_modules() if "lora_dropout" in n and isinstance(layer, nn.Dropout)}
    for number, (name, layer) in enumerate(layers.items()):
        lora.set_submodule(name, Dropout(layer.p, number))
    return lora


def add_lora(llm: Any, rank: int, alpha: int, dropout: float) -> Any:
    """Wrap `llm` in a fresh PEFT LoRA on the linear layers of its attention (q, k, v and o in most); float32."""
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    decoder = set(llm.get_decoder().modules())  # a model may see and hear too
    # By whole names: in GPT-2 the MLP has a c_proj too.
    names = [n for n, layer in llm.named_modules() if layer in decoder and isinstance(layer, linear) and "att" in n]
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    return _with_own_dropout(peft.get_peft_model(llm, lora))


def load_lora(llm: Any, folder: Path, trainable: bool = False) -> Any:
    """Put a saved adapter on `llm`. A folder that is none, or holds other weights, is a UserError (cases D07, D08)."""
    other = f"{folder}: no PEFT adapter of this model"
    try:
        model = _with_own_dropout(peft.PeftModel.from_pretrained(llm, folder, is_trainable=trainable))
    except (RuntimeError, ValueError, SafetensorError) as error:  # not there, cut short, or weights of another shape
        raise UserError(f"{other}: {str(error).splitlines()[-1]}") from error
    saved = set(load_file(folder / "adapter_model.safetensors"))
    if differ := saved ^ set(peft.get_peft_model_state_dict(model, save_embedding_layers=False)):
        raise UserError(f"{other}: {len(differ)} of its weights are missing or unknown, for example {min(differ)}")
    return model


# ---- from prompts to token ids ----------------------------------------------------------------------------------


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The beginning and the end of every sequence: one BOS where the tokenizer has one, one EOS (cases D05, D06)."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    return [] if bos is None else [bos], [eos]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, nothing added; "</s>" in a title is four characters, not the end."""
    how = {"add_special_tokens": False, "split_special_tokens": True}
    blocks = cut(texts, 1024)  # beside the ids a tokenizer keeps a hundred bytes a token
    return [ids for block in blocks for ids in tokenizer(block, **how).input_ids]


def chat_ids(tokenizer: Any, message: str) -> list[int]:
    """Token ids of one user message ready to be answered: by the chat template if there is one, else as it stands.

    A model that can do without thinking first is told to: its thoughts alone would fill the answer.
    """
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": message}]
        how = {"add_generation_prompt": True, "return_dict": False, "sanitize_control_tokens": True}
        try:
            return list(tokenizer.apply_chat_template(chat, enable_thinking=False, **how))
        except jinja2.TemplateError as error:
            cure = "mend chat_template in its folder or take another model"
            raise UserError(f"the model's chat template fails on a single question: {error}; {cure}") from error
    return special_ids(tokenizer)[0] + encode(tokenizer, [message])[0]


@dataclass(frozen=True)
class Queries:
    """The token ids of q(u, i): `row` joins a user's part and the item parts of any of the user's pairs."""

    user_parts: list[list[int]]
    item_parts: list[list[int]]
    end: list[int]
    eos: list[int]
    n_shortened: int  # parts that had to be cut to their token limit

    def row(self, user: int, items: Sequence[int], soft: bool = True) -> tuple[list[int], list[list[int]]]:
        """Prefix and continuations for `pack`; soft token u stands for c_u, soft token U + i for c_i."""
        first_item = len(self.user_parts)
        numbers = [[-1 - user, -1 - first_item - i] if soft else [] for i in items]
        parts = [self.item_parts[i] + self.end + n + self.eos for i, n in zip(items, numbers, strict=True)]
        return self.user_parts[user], parts


def make_queries(
    tokenizer: Any, users: list[dict], items: list[dict], max_user_tokens: int, max_item_tokens: int
) -> Queries:
    """Tokenise q(u, i) for every user and item.

    A part that is too long loses its end: of a user's profile, which tells the newest first, the oldest; of an item,
    the profile behind the title. Instruction, soft tokens and EOS are always whole (case D03). The longest query has
    max_user_tokens + max_item_tokens tokens.
    """
    bos, eos = special_ids(tokenizer)
    end = encode(tokenizer, [QUERY_END])[0]
    of_user = encode(tokenizer, [fill(QUERY_USER, profile=user["profile"]) for user in users])
    of_item = encode(tokenizer, [fill(QUERY_ITEM, item=item_words(item)) for item in items])
    room_user, room_item = max_user_tokens - len(bos), max_item_tokens - len(end) - 2 - len(eos)  # two soft tokens
    bare_user, bare_item = map(len, encode(tokenizer, [fill(QUERY_USER, profile=""), fill(QUERY_ITEM, item="")]))
    if room_user <= bare_user or room_item <= bare_item:
        least = max_user_tokens - room_user + bare_user + 1, max_item_tokens - room_item + bare_item + 1
        told = "max_user_tokens and max_item_tokens leave no room beside the instructions"
        raise UserError(f"{told}; the least that works is {least[0]} and {least[1]}")
    n_shortened = sum(len(ids) > room_user for ids in of_user) + sum(len(ids) > room_item for ids in of_item)
    users_ids, item_ids = [bos + ids[:room_user] for ids in of_user], [ids[:room_item] for ids in of_item]
    return Queries(users_ids, item_ids, end, eos, n_shortened)


@dataclass(frozen=True)
class Batch:
    """Packed rows, see the top of this file."""

    ids: Tensor  # int64 [R, L]; -1 - n stands for soft token n
    branch: Tensor  # int64 [R, L]; 0: prefix, k: k-th continuation, -1: padding
    position: Tensor  # int64 [R, L]; place in prefix + continuation


Row = tuple[Sequence[int], Sequence[Sequence[int]]]  # prefix, continuations


def n_tokens(row: Row) -> int:
    prefix, parts = row
    return len(prefix) + sum(map(len, parts))


def pack(rows: Sequence[Row], device: str = "cpu") -> Batch:
    """Lay out (prefix, continuations) rows; pairs are numbered row by row, in the order of the continuations."""
    columns = []
    for prefix, parts in rows:
        tokens = [*prefix, *chain(*parts)]
        piece = [0] * len(prefix) + [k for k, part in enumerate(parts, 1) for _ in part]
        place = [*range(len(prefix)), *(len(prefix) + n for part in parts for n in range(len(part)))]
        columns.append(torch.from_numpy(np.array([tokens, piece, place]).T))  # [L, 3]
    ids, branch, position = pad_sequence(columns, batch_first=True, padding_value=-1).to(device).unbind(2)  # [R, L]
    return Batch(ids.masked_fill(branch < 0, 0), branch, position.clamp(min=0))


# ---- from token ids to vectors ----------------------------------------------------------------------------------


def embed(llm: Any, batch: Batch, soft: Tensor | None = None, pooling: str = "last") -> Tensor:
    """One vector per continuation: the only way from a prompt to a vector, in tuning and in generation.

    soft     float [n_soft, d_llm], the input embeddings that stand at the places of the soft tokens, in reading order
    pooling  "last": hidden state of the continuation's last token (its EOS); "mean": over its tokens
    Returns  float32 [P, d_llm]; padding and the other rows of the batch have no influence on a vector (case D04)
    """
    inputs = llm.get_input_embeddings()(batch.ids.clamp(min=0))  # [R, L, d_llm]
    if soft is not None:
        inputs = inputs.masked_scatter((batch.ids < 0).unsqueeze(-1), soft.to(inputs.dtype))
    branch, order = batch.branch, torch.arange(batch.ids.shape[1], device=batch.ids.device)
    seen = (branch.unsqueeze(2) == branch.unsqueeze(1)) | (branch == 0).unsqueeze(1)
    seen &= order.unsqueeze(0) <= order.unsqueeze(1)  # [R, L, L]: row token q sees token k
    mask = torch.zeros(seen.shape, dtype=inputs.dtype, device=inputs.device)
    mask = mask.masked_fill(~seen, torch.finfo(inputs.dtype).min).unsqueeze(1)  # [R, 1, L, L], as the models take it
    hidden = llm.get_decoder()(
        inputs_embeds=inputs, attention_mask=mask, position_ids=batch.position, use_cache=False
    ).last_hidden_state.float()  # [R, L, d_llm]

    follows = torch.cat([branch[:, 1:], branch.new_full((len(branch), 1), -1)], dim=1)
    is_last = (branch > 0) & (branch != follows)
    if pooling == "last":
        return hidden[is_last]  # [P, d_llm]
    inside = branch > 0
    pair = (is_last.flatten().cumsum(0) - is_last.flatten().long())[inside.flatten()]  # number of the token's pair
    tokens = hidden[inside]
    total = tokens.new_zeros(int(is_last.sum()), tokens.shape[1]).index_add_(0, pair, tokens)
    return total / torch.bincount(pair).unsqueeze(1)


class Head(nn.Module):
    """From h to the space of the targets: each coordinate of h standardised, then a linear map.

    Hidden states of one model are nearly parallel: what tells two prompts apart is small beside what all have in
    common, so the common part is taken out first.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, d_llm: int, d_out: int):
        super().__init__()
        self.register_buffer("center", torch.zeros(d_llm))
        self.register_buffer("spread", torch.ones(d_llm))
        self.linear = nn.Linear(d_llm, d_out)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear((h - self.center) / self.spread)

    @torch.no_grad()
    @one_thread()
    def solve(self, h: Tensor, wanted: Tensor, ridge: float = 0.1) -> None:
        """Standardise by h [B, d_llm] and put the map at the ridge regression of `wanted` [B, d_out], times a number.

        Only directions are compared, so the number is free: it makes the weights as large as a fresh layer's, as
        steps of Adam would soon undo a solution with tiny ones.
        """
        self.center.copy_(h.mean(0))
        self.spread.copy_(h.std(0) + 1e-6)
        x, mean = (h - self.center) / self.spread, wanted.mean(0)
        gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], device=x.device)
        solved = torch.linalg.solve(gram, x.T @ (wanted - mean))  # [d_llm, d_out]
        size = (3 * len(solved)) ** -0.5 / solved.std()
        self.linear.weight.copy_(solved.T * size)
        self.linear.bias.copy_(mean * size)


class NegativeModel(nn.Module):
    """The LM with what tuning adds: LoRA, a projection of c_u and c_i to one soft token each, and an output head.

    cf_user, cf_item  float32 [U, d_cf], [I, d_cf]: the collaborative vectors; soft token n is
                      user n if n < U, else item n - U
    d_out             width of the space in which h is compared with the targets
    """

    cf: Tensor

    def __init__(self, llm: Any, cf_user: np.ndarray, cf_item: np.ndarray, d_out: int):
        super().__init__()
        self.llm = llm
        embedding = llm.get_input_embeddings()
        device = embedding.weight.device
        cf = np.concatenate([cf_user / cf_user.std(), cf_item / cf_item.std()])
        self.register_buffer("cf", torch.from_numpy(cf), persistent=False)
        self.n_users = len(cf_user)
        d_llm, d_cf = llm.config.get_text_config().hidden_size, cf_user.shape[1]
        self.user_projection, self.item_projection = nn.Linear(d_cf, d_llm), nn.Linear(d_cf, d_llm)
        # Choice: a soft token starts about as long as a word's embedding, so the frozen layers can read it at once.
        words = embedding(torch.arange(embedding.num_embeddings, device=device))  # [V, d_llm]; Gemma's are scaled there
        scale = words.float().std().item() / d_cf**0.5
        for projection in (self.user_projection, self.item_projection):
            nn.init.normal_(projection.weight, std=scale)
            nn.init.zeros_(projection.bias)
        self.head = Head(d_llm, d_out)
        self.to(device)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """h [P, d_llm], the vectors that are kept, and head(h) [P, d_out], what the loss and the matching compare."""
        number = -1 - batch.ids[batch.ids < 0]  # soft tokens in reading order
        is_user, c = (number < self.n_users).unsqueeze(1), self.cf[number]
        h = embed(self.llm, batch, torch.where(is_user, self.user_projection(c), self.item_projection(c)))
        return h, self.head(h)

    def save(self, folder: Path) -> None:
        """adapter/ as PEFT writes it, and projections.safetensors: soft tokens and head."""
        self.llm.save_pretrained(folder / "adapter", save_embedding_layers=False)  # "auto" would ask the hub (D14)
        config = load_json(folder / "adapter" / "adapter_config.json")
        config["target_modules"].sort()  # a set in PEFT: its order changes from process to process
        save_json(folder / "adapter" / "adapter_config.json", config)
        own = {name: t.cpu().contiguous() for name, t in self.state_dict().items() if not name.startswith("llm.")}
        save_file(own, folder / "projections.safetensors")

    def load_projections(self, folder: Path, head: bool = True) -> None:
        """The soft tokens of a saved model, and its head unless that is left out."""
        with whole(folder / "projections.safetensors"):
            own = load_file(folder / "projections.safetensors")
        own = {name: t for name, t in own.items() if head or not name.startswith("head.")}
        assert not self.load_state_dict(own, strict=False).unexpected_keys


def load_negative_model(llm: Any, folder: Path, cf_user: np.ndarray, cf_item: np.ndarray) -> NegativeModel:
    """The tuned model of a finished sft/ folder, on the untuned `llm` it was made from."""
    d_out = load_npy(folder / "targets.npy", mmap=True).shape[1]
    model = NegativeModel(load_lora(llm, folder / "adapter"), cf_user, cf_item, d_out)
    model.load_projections(folder)
    if llm.dtype == torch.float32 and not sharded() and not getattr(llm, "is_loaded_in_4bit", False):
        model.llm.merge_adapter()  # W + BA once and not in every batch; bfloat16 would round the small BA away
    return model.eval()


# ---- texts ------------------------------------------------------------------------------------------------------


def text_vectors(llm: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 16) -> np.ndarray:
    """Mean of the last hidden states over each text's tokens and its EOS, centred over the texts; float32 [n, d_llm].

    BOS is shared and left out of the mean; an empty text is its EOS alone (case D18).
    """
    bos, eos = special_ids(tokenizer)
    parts = [ids[:TEXT_TOKENS] + eos for ids in encode(tokenizer, texts)]
    device = llm.get_input_embeddings().weight.device
    batches = cut(parts, batch_size)

    def read(some: list[list[int]]) -> Tensor:
        return embed(llm, pack([(bos, some)], device), pooling="mean").cpu()

    vectors = progress(in_parallel(read, batches, device.type), total=len(batches), desc="texts")
    found = np.empty((len(parts), llm.config.get_text_config().hidden_size), np.float32)  # once: it may be many GB
    for number, some in enumerate(vectors):
        found[number * batch_size :][: len(some)] = some
    found -= found.mean(axis=0)
    return found


def generate_texts(llm: Any, tokenizer: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy continuation of each prompt; padded on the left, masked by length, not by the pad token's id (D05)."""
    how = {"padding_side": "left", "return_attention_mask": True, "return_tensors": "pt"}
    asked = tokenizer.pad({"input_ids": prompts}, **how).to(llm.device)
    said = llm.generate(**asked, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    return tokenizer.batch_decode(said[:, asked.input_ids.shape[1] :], skip_special_tokens=True)


@one_thread()
def whiten(vectors: np.ndarray, n_directions: int = 512) -> np.ndarray:
    """Coordinates along the strongest directions of centred vectors, each scaled to variance 1; float32 [n, <= 512]."""
    left, strength, _ = (x.numpy() for x in torch.linalg.svd(torch.from_numpy(vectors), full_matrices=False))
    kept = strength[:n_directions] > 1e-6 * strength[0]
    return np.ascontiguousarray(left[:, :n_directions][:, kept] * len(vectors) ** 0.5)  # as the core takes them


# ---- tuning -----------------------------------------------------------------------------------------------------


def gradients(
    model: NegativeModel, read: Callable, users: list[int], loss: Callable, seed: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The losses of a micro-batch, and the gradient of its "objective" by every trainable weight.

    read  users -> tensors with a row for each of their pairs, the first of them the vectors; loss takes them all
    seed  of dropout

    Where sums depend on the number of threads, every two users are one thread's: all vectors are made, the loss is
    differentiated by them, and each thread goes on backwards from there; gradients are added in the users' order.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    apart = sums_vary(model.llm) and not sharded()
    pieces = cut(users, 2) if apart else [users]

    def each(function: Callable) -> list:
        def call(number: int) -> Any:
            Dropout.of_thread.seed = hash((seed, number))  # backwards too: activations may be computed again
            with torch.enable_grad():
                return function(number)

        numbers = range(len(pieces))
        return list(in_parallel(call, numbers, "cpu") if apart else map(call, numbers))

    made = each(lambda number: read(pieces[number]))
    vectors, *others = (torch.cat(parts) for parts in zip(*made, strict=True))
    with one_thread():  # a mean over many numbers has other last digits when threads share it
        figures = loss(vectors, *others)
        (slope,) = torch.autograd.grad(figures["objective"], vectors)
    slopes = slope.split([len(part[0]) for part in made])
    found = each(lambda number: torch.autograd.grad(made[number][0], weights, slopes[number], materialize_grads=True))
    return figures, [sum(parts[1:], parts[0]) for parts in zip(*found, strict=True)]

"""LLM-enhanced recommenders to compare with, as enhancers of any encoder: RLMRec (both alignments) and KAR.

An enhancer reads the text vectors of users and items (stage 02, from the untuned model). `augment` changes the ego
vectors on their way into the encoder, `extra_loss` is added to the loss of a batch. Letters as in `losses.py`.
"""

import numpy as np
import torch
from torch import Tensor, nn

from hnlm_ref.losses import info_nce
from hnlm_ref.samplers import Batch


def mlp(n_in: int, n_out: int) -> nn.Sequential:
    hidden = (n_in + n_out) // 2
    return nn.Sequential(nn.Linear(n_in, hidden), nn.LeakyReLU(), nn.Linear(hidden, n_out))


class Enhancer(nn.Module):
    """text float32 [U + I, d_llm], users first. Choice: standardised, since raw hidden states are nearly parallel.

    weight  lambda_extra, of what `augment` adds; that of the loss is stage 04's to apply
    """

    text: Tensor

    def __init__(self, text: np.ndarray, n_users: int, dim: int, weight: float):
        super().__init__()
        self.weight = weight
        standard = (text - text.mean(0)) / np.maximum(text.std(0), 1e-6)
        self.register_buffer("text", torch.from_numpy(standard.astype(np.float32)), persistent=False)
        self.n_users = n_users

    def augment(self, table: Tensor) -> Tensor:
        return table

    def extra_loss(self, batch: Batch, user_emb: Tensor, item_emb: Tensor) -> Tensor:
        return torch.zeros((), device=user_emb.device)


class RlmRecContrastive(Enhancer):
    """RLMRec-Con (Ren et al., WWW 2024): InfoNCE between a node's vector and the projection of its text.

    Choice: InfoNCE among the batch's users (theirs: all users) and among its positives, each once, since a node is no
    negative of itself; temperature 0.2, as most of theirs, without the term of the sampled negatives. Their encoders
    also drop a fifth of the edges; none of ours does.
    """

    def __init__(self, text: np.ndarray, n_users: int, dim: int, weight: float):
        super().__init__(text, n_users, dim, weight)
        self.project = mlp(text.shape[1], dim)

    def extra_loss(self, batch: Batch, user_emb: Tensor, item_emb: Tensor) -> Tensor:
        users, items = batch.users.unique(), batch.items.unique()
        user_text, item_text = self.project(self.text[users]), self.project(self.text[self.n_users + items])  # [B, d]
        return info_nce(user_emb[users], user_text, 0.2) + info_nce(item_emb[items], item_text, 0.2)


class RlmRecGenerative(Enhancer):
    """RLMRec-Gen (same paper): a masked node's text is to be told from what the encoder makes of its neighbours.

    A tenth of the nodes is replaced by a learnt mask vector at every step; the loss is InfoNCE between the projected
    vectors of masked nodes and their texts. Choice: at most 1,024 masked nodes enter a step's loss; the tenth and the
    temperature, 0.2, are fixed, where theirs vary from data set to data set (0.05 to 0.15, 0.1 to 1).
    """

    def __init__(self, text: np.ndarray, n_users: int, dim: int, weight: float):
        super().__init__(text, n_users, dim, weight)
        self.mask = nn.Parameter(torch.zeros(dim))
        self.project = mlp(dim, text.shape[1])

    def augment(self, table: Tensor) -> Tensor:
        if not self.training:
            return table
        self.masked = torch.randperm(len(table), device=table.device)[: max(2, len(table) // 10)]
        return table.index_put((self.masked,), self.mask)

    def extra_loss(self, batch: Batch, user_emb: Tensor, item_emb: Tensor) -> Tensor:
        nodes = self.masked[:1024]
        return info_nce(self.project(torch.cat([user_emb, item_emb])[nodes]), self.text[nodes], 0.2)


class Kar(Enhancer):
    """KAR (Xi et al., RecSys 2024): a hybrid-expert adaptor turns texts into vectors added to the ego vectors.

    Per side two experts of its own and two shared ones, mixed by a softmax gate. Choice: the text vector stands for
    the paper's reasoning and factual knowledge, and is added (RLMRec's authors concatenate), since the encoders have no
    feature input: with a weight, and from zero, as at full strength the experts fit the training pairs before the ego
    vectors have moved.
    """

    def __init__(self, text: np.ndarray, n_users: int, dim: int, weight: float):
        super().__init__(text, n_users, dim, weight)
        n_in = text.shape[1]
        self.shared = nn.ModuleList([mlp(n_in, dim) for _ in range(2)])
        self.own = nn.ModuleList([mlp(n_in, dim) for _ in range(4)])  # two of the users', two of the items'
        self.gates = nn.ModuleList([nn.Linear(n_in, 4) for _ in range(2)])
        for expert in (*self.shared, *self.own):
            nn.init.zeros_(expert[-1].weight)
            nn.init.zeros_(expert[-1].bias)

    def augment(self, table: Tensor) -> Tensor:
        sides = []
        for side, text in enumerate(self.text.split([self.n_users, len(table) - self.n_users])):
            experts = [*self.shared, *self.own[2 * side : 2 * side + 2]]
            outputs = torch.stack([expert(text) for expert in experts], 1)  # [U or I, 4, d]
            sides.append((self.gates[side](text).softmax(-1)[..., None] * outputs).sum(1))
        return table + self.weight * torch.cat(sides)


ENHANCERS = {"rlmrec_con": RlmRecContrastive, "rlmrec_gen": RlmRecGenerative, "kar": Kar}

"""One batch of texts: its clean run, kept, and what edits of it change."""

import torch
from torch import Tensor, nn

from lrqp_torch.edits.record import EditRun
from lrqp_torch.errors import NonFiniteError
from lrqp_torch.stream.intervene import EditContext, Intervention, intervene
from lrqp_torch.stream.replay import Tail
from lrqp_torch.study.attribution import attention_to
from lrqp_torch.study.compare.editable import Editable, Run
from lrqp_torch.study.compare.partners import with_partners


class Batch:
    """One batch, its clean run, and what edits of it change."""

    def __init__(
        self,
        tail: Tail,
        batch: Editable,
        patterns: dict[int, Tensor],
        heads: list[tuple[int, int]],
        watched: int,
    ) -> None:
        self._tail, self._batch, self._patterns, self._heads = tail, batch, patterns, heads
        self._watched = watched
        columns = batch.elsewhere.any(0)
        columns[-1] = True
        self._columns = columns.nonzero().flatten()
        self._rows = torch.arange(len(batch), device=batch.positions.device)
        logits = _finite(tail.run(self._rows, self._columns), "the clean run")
        self._log_p = logits.float().log_softmax(-1)
        self._shift = self._attention() if heads and batch.keys is not None else None
        zeros = torch.zeros(len(batch), dtype=torch.float64)
        names = ("distance", "euclidean", "divergence", "rest")
        self.clean = dict.fromkeys(names, zeros)
        self.clean["said_elsewhere"] = self._said(self._log_p)
        self.clean |= self._answers(logits)

    def edited(self, model: nn.Module, site: str, run: Run, rows: Tensor) -> dict[str, Tensor]:
        """Columns and activations of the batch, which holds texts ``rows``."""
        batch = self._batch
        edit = with_partners(run.edit, run.partners[rows.to(run.partners.device)])
        target = run.target[rows.to(run.target.device)].to(batch.positions.device)
        item = edit.on(site, positions=batch.positions, target=target, source=batch.source)
        record = item.edit
        assert isinstance(record, EditRun)
        after: list[Tensor] = []

        def act(x: Tensor, context: EditContext) -> Tensor:
            changed = record(x, context)
            after[:] = [changed[context.index.argsort()]]
            return changed

        with intervene(model, Intervention(site, batch.positions, act)):
            logits = _finite(self._tail.run(self._rows, self._columns), f"{edit.name} at {site}")
        found = {
            "distance": record.distance,
            "euclidean": record.euclidean,
            **self._divergences(logits),
            "activations": after[0].float(),
        }
        found |= self._answers(logits)
        if self._shift is not None:
            found["attention"] = (self._attention() - self._shift).sum(-1) / self._watched
        return found

    def _divergences(self, logits: Tensor) -> dict[str, Tensor]:
        """Mean KL(clean ‖ edited) over each text's columns, and its part beside the answers, (B,).

        By the chain rule KL is that of the three events IO, S and neither, and P(neither) times the
        KL of the next token given neither; the latter is ``rest``. Without answers it is all.
        """
        log_q = logits.float().log_softmax(-1)
        terms = self._log_p.exp() * (self._log_p - log_q)
        # Rounding may leave a sum of 1e-9 below 0.
        whole = terms.sum(-1).clamp_min(0)
        if self._batch.answers is None:
            return {"divergence": self._mean(whole), "rest": self._mean(whole)}
        names = self._batch.answers.unsqueeze(1).expand(-1, logits.shape[1], -1)
        neither = [
            torch.log1p(-log.gather(-1, names).exp().sum(-1).clamp_max(1 - 1e-7))
            for log in (self._log_p, log_q)
        ]
        about = terms.gather(-1, names).sum(-1) + neither[0].exp() * (neither[0] - neither[1])
        rest = (terms.sum(-1) - about).clamp_min(0)
        return {"divergence": self._mean(whole), "rest": self._mean(rest)}

    def _said(self, log_p: Tensor) -> Tensor:
        """Mean probability of either answer over each text's columns, (B,); 0 without answers."""
        if self._batch.answers is None:
            return torch.zeros(len(self._batch), dtype=torch.float64)
        names = self._batch.answers.unsqueeze(1).expand(-1, log_p.shape[1], -1)
        return self._mean(log_p.gather(-1, names).exp().sum(-1))

    def _mean(self, values: Tensor) -> Tensor:
        """Mean over the columns elsewhere, (B, columns) → (B,)."""
        mask = self._batch.elsewhere[:, self._columns]
        return (values * mask).sum(-1) / mask.sum(-1)

    def _answers(self, logits: Tensor) -> dict[str, Tensor]:
        if self._batch.answers is None:
            return {}
        io, s = logits[:, -1].gather(-1, self._batch.answers).double().unbind(-1)
        return {"logit_difference": io - s}

    def _attention(self) -> Tensor:
        """END→IO less END→S1 of each watched head that an edit can reach, (B, heads)."""
        assert self._batch.keys is not None
        io, s1 = self._batch.keys.unbind(-1)
        return torch.stack(
            [
                (attention_to(self._patterns[n], io) - attention_to(self._patterns[n], s1))[:, h]
                for n, h in self._heads
            ],
            dim=-1,
        )


def _finite(logits: Tensor, where: str) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(
            f"the model's logits contain NaN or infinity in {where}. Try the model in float32."
        )
    return logits

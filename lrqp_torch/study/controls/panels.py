"""The illusion controls in the interactive report, with what they say in words."""

from lrqp_torch.study.controls.figures import flips_by_kind
from lrqp_torch.study.controls.findings import (
    chance_findings,
    half_findings,
    site_findings,
    split_findings,
)
from lrqp_torch.study.controls.interactive import chance_figure, sites_figure, splits_figure
from lrqp_torch.study.controls.outcomes import ControlsResult
from lrqp_torch.study.controls.tables import chance_table, site_table, split_table
from lrqp_torch.study.panel import Panel


def panels(result: ControlsResult) -> list[Panel]:
    """Splits, other sites, chance, and halves."""
    made = [
        Panel(
            name="controls-splits",
            title="Which part of the edit carries its effect?",
            text=" ".join(split_findings(result)),
            figures={"": splits_figure(result)} if result.counterfactual.effect is not None else {},
            table=split_table(result),
        )
    ]
    if result.elsewhere:
        made.append(
            Panel(
                name="controls-sites",
                title="The same edit at other sites",
                text=" ".join(site_findings(result)),
                figures={"": sites_figure(result)},
                table=site_table(result),
            )
        )
    made.append(
        Panel(
            name="controls-chance",
            title="Edits that know nothing of the order, and edits from half of the prompts",
            text=" ".join([*chance_findings(result), *half_findings(result)]),
            figures={"": chance_figure(result)} if flips_by_kind(result) else {},
            table=chance_table(result),
        )
    )
    return made

"""What the illusion controls say in words."""

from lrqp_torch.study.controls.chance import KINDS
from lrqp_torch.study.controls.outcomes import (
    CARRIES,
    SEPARATED,
    ControlsResult,
    Split,
)
from lrqp_torch.study.controls.readers import ENERGY
from lrqp_torch.study.drawing import (
    as_interval,
    as_percent,
    signed,
)


def split_findings(result: ControlsResult) -> list[str]:
    """What the splits say, in sentences made from the numbers."""
    lines = [
        f"The counterfactual edit δ at {result.site}, of mean Mahalanobis length "
        f"{result.distance:.2f}, changes the mean logit difference IO − S from "
        f"{signed(result.clean.value)} to {signed(result.counterfactual.logit_difference.value)} "
        f"and flips {as_percent(result.counterfactual.flipped)} of the answers "
        f"(control edit: {as_percent(result.control.flipped)})."
    ]
    if result.whole is not None:
        lines.append(
            f"Along its own direction the classes lie {result.whole.separation:.1f} standard "
            f"deviations within a class apart; the edited activations lie "
            f"{result.whole.position:.1f} standard deviations from the mean, the farthest natural "
            f"one {result.whole.farthest:.1f}."
        )
    if result.unread:
        lines.append(f"It was not split by what later parts read: {result.unread}.")
    if result.counterfactual.effect is None:
        lines.append(
            "The 95 % interval of its mean effect includes 0, so there is none of which a part "
            "could carry a share."
        )
        return lines
    if any(split.reads for split in result.splits):
        lines.append(
            "Heads and MLP read the stream through weights that span nearly all of it; a space "
            f"here is that of their leading directions with {100 * ENERGY:.0f} % of the weights' "
            "squared Frobenius norm, norm folded in."
        )
    lines += [_carrier(split) for split in result.splits]
    longest = max(max(s.inside.mahalanobis, s.outside.mahalanobis) for s in result.splits)
    if longest > 1:
        lines.append(
            f"In the metric a part alone is up to {longest:.1f} times as long as the edit: cut in "
            "two, it leaves the paths along which natural activations vary, so its run tells what "
            "is read of the edit and not what the model would meet by itself."
        )
    readers = [split for split in result.splits if split.reads]
    suspect = [split.space for split in readers if split.illusory]
    if suspect:
        lines.append(
            "The illusion's signature is there: the part read carries the effect though the "
            f"classes hardly differ along it (less than {SEPARATED:g} standard deviation), and "
            f"they differ in the part that is not read. Space: {', '.join(suspect)}."
        )
    elif readers:
        lines.append(
            "The illusion's signature, a part that carries the effect though the classes hardly "
            f"differ along it (less than {SEPARATED:g} standard deviation) beside one that is not "
            "read though they do, is not there."
        )
    return lines


def site_findings(result: ControlsResult) -> list[str]:
    """What the other sites say."""
    accurate = [item for item in result.elsewhere if item.as_accurate]
    lines = [
        f"The displacement of {result.site} was added at S2 at other sites, and beside it the edit "
        f"that was fitted there. At {result.site} the probe is right in "
        f"{as_percent(result.probe_accuracy)} of the held-out prompts, and "
        f"{as_percent(result.counterfactual.flipped)} of the answers flip. A displacement added "
        "below that site is carried up to it by the stream, unless later layers change it."
    ]
    if not accurate:
        return [*lines, "At no other site is the probe as accurate."]
    still = [item for item in accurate if (item.fitted.flipped or 0.0) >= CARRIES]
    idle = [item.site for item in accurate if (item.fitted.flipped or 0.0) < CARRIES]
    lines.append(
        f"At {_listed([item.site for item in accurate])} the probe is as accurate, within a "
        "percentage point."
    )
    if idle:
        lines.append(
            f"Of these, the edit fitted at {_listed(idle)} flips less than half of the answers: as "
            "good a probe, and by the study's rule no use there of what it reads."
        )
    if still:
        sites = _listed([item.site for item in still])
        lines.append(f"The edit fitted at {sites} flips half or more as well.")
    return lines


def chance_findings(result: ControlsResult) -> list[str]:
    """What edits that know nothing of the order say."""
    known = [item for item in result.chance if item.mean_flipped is not None]
    if not known:
        return ["No held-out prompt is answered IO, so none can be flipped."]
    lines = [f"{kind[0].upper()}{kind[1:]}: {text}." for kind, text in KINDS.items()]
    top = max(known, key=lambda item: item.mean_flipped.value if item.mean_flipped else 0.0)
    assert top.mean_flipped is not None
    lines.append(
        f"Of these the {top.kind} flips most: {100 * top.mean_flipped.value:.1f} % of the answers "
        f"over {len(top.flipped)} seeds (95 % interval "
        f"{as_interval([100 * top.mean_flipped.lower, 100 * top.mean_flipped.upper], 1)}; single "
        f"seeds {100 * min(top.flipped):.1f} to {100 * max(top.flipped):.1f}), beside "
        f"{as_percent(result.counterfactual.flipped)} for the study's edit."
    )
    return lines


def half_findings(result: ControlsResult) -> list[str]:
    """What the edits from disjoint halves say of each other."""
    halves = result.halves
    if halves is None:
        return ["A half of the training prompts has too few of one order to fit an edit to."]
    return [
        f"Two edits fitted to disjoint halves ({halves.prompts[0]} and {halves.prompts[1]} "
        f"prompts; probes right in {as_percent(halves.accuracy[0])} and "
        f"{as_percent(halves.accuracy[1])}) have a cosine of {halves.cosine:.2f} "
        f"({halves.cosine_mahalanobis:.2f} in the metric), flip "
        f"{as_percent(halves.outcomes[0].flipped)} and {as_percent(halves.outcomes[1].flipped)} of "
        f"the answers and give the same answer to {as_percent(halves.same_answer)} of the prompts. "
        f"The other half's probe reads the order written after "
        f"{as_percent(halves.believed[0])} and {as_percent(halves.believed[1])} of them."
    ]


def _carrier(split: Split) -> str:
    inside, outside = split.inside, split.outside
    who = {
        "inside": "the part inside carries the effect",
        "outside": "the rest carries the effect",
        "both": "either part alone would do",
        "neither": "neither part alone carries the effect",
    }[split.carrier]
    return (
        f"{split.space[0].upper()}{split.space[1:]} ({split.dimensions} of {split.width} "
        f"dimensions, {as_percent(inside.share)} of ‖δ‖²): alone, the part inside brings about "
        f"{as_percent(inside.outcome.effect)} of the effect and the rest "
        f"{as_percent(outside.outcome.effect)}, so {who}."
    )


def _listed(sites: list[str]) -> str:
    return sites[0] if len(sites) == 1 else f"{', '.join(sites[:-1])} and {sites[-1]}"

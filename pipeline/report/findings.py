"""Findings: what looks wrong in a cache, from its records alone. Each is one plain sentence.

The findings of a sample of rows are in `sample_findings`, those of images that were encoded again in `recheck`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from latentmill.cache_info import VaeInfo
from pipeline.cache import stats
from pipeline.report.constants import expect_channels, pool_patches
from pipeline.wording import count_noun

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
MIN_ROWS = 100  # of a cache that is compared with the constants of its VAE, which are of very many images
NEAR_ONE = 0.2  # the most that log(std) of a scaled channel differs from 0
FAR = 0.4  # the least that it differs from the log(std) of the constants, in a cache that was scaled
NARROW, WIDE = 0.6, 2.0  # the ratios of the standard deviation to that of the constants that are still normal
NEARLY_CONSTANT = 1e-4  # the standard deviation of a channel, relative to that of the widest channel
SHIFTED = 1.5  # standard deviations by which the mean of a channel differs
ENLARGED_SHARE, REJECTED_SHARE = 0.25, 0.01
FLOAT16_MAX = 65504.0
MAX_EXAMPLES = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A row or a file that shows a finding. remark: what is shown about it.

    places: file and index of the row, and of a row that is like it.
    """

    key: str
    shard: str = ""
    remark: str = ""
    places: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that looks wrong.

    code: its kind, for programs. sentence: what was found, and what may have caused it. examples: up to six rows that
    show it. command: the command that shows more; `{cache}` stands for the cache.
    """

    code: str
    severity: Severity
    sentence: str
    examples: tuple[Example, ...] = ()
    command: str = "latentmill report {cache} --to report.html --sample 0"

    def for_cache(self, url: str) -> "Finding":
        """Return the finding with the cache's URL in its command."""
        return replace(self, command=self.command.replace("{cache}", url))


def format_finding(finding: Finding) -> str:
    """Return a finding as one line, with the command that shows more."""
    return f"{finding.sentence} More: {finding.command}"


def sort_findings(findings: Sequence[Finding]) -> list[Finding]:
    """Return one finding per kind, the most severe first. Of equal kinds, the first counts."""
    first = {finding.code: finding for finding in reversed(findings)}
    return sorted(first.values(), key=lambda finding: (SEVERITIES.index(finding.severity), finding.code))


def find_in_records(content: Mapping[str, Any], vae: VaeInfo) -> list[Finding]:
    """Return the findings of stats.json. content: its content. vae: the VAE's entry in cache.json."""
    found = [*find_channels(content), *find_rejects(content), *find_enlarged(content)]
    if content["count"] >= MIN_ROWS:
        found += compare_with_constants(content["mean"], content["std"], vae)
    return sort_findings(found)


def find_channels(content: Mapping[str, Any]) -> list[Finding]:
    """Return the findings of channels that are constant, or whose values are at the limit of float16."""
    command = "latentmill stats {cache}"
    found = [
        Finding(code="dead-channel", severity="error", sentence=sentence, command=command)
        for sentence in describe_dead_channels(content)
    ]
    extremes = [
        max(abs(low), abs(high)) for low, high in zip(content.get("min", []), content.get("max", []), strict=True)
    ]
    saturated = [channel for channel, value in enumerate(extremes) if value >= FLOAT16_MAX]
    if saturated:
        sentence = f"Channels {join(saturated)} have values at the limit of float16: store float32 or bfloat16."
        found.append(Finding(code="saturated-channel", severity="error", sentence=sentence, command=command))
    return found


def describe_dead_channels(content: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each constant or nearly constant channel. Such a channel suggests a broken VAE."""
    stds = content.get("std", [])
    widest = max(stds, default=0.0)
    return [
        f"Channel {channel} of the latents is {'constant' if not std else 'nearly constant'} (mean {mean:.4g}, std "
        f"{std:.2g}): is the VAE broken, or every image the same?"
        for channel, (mean, std) in enumerate(zip(content.get("mean", []), stds, strict=True))
        if content["count"] > 1 and std <= NEARLY_CONSTANT * widest
    ]


def find_rejects(content: Mapping[str, Any]) -> list[Finding]:
    """Return a finding if more than 1% of the samples were rejected."""
    rejected, samples = stats.count_samples(content)
    if not rejected or rejected <= REJECTED_SHARE * samples:
        return []
    most = max(content["rejected"], key=lambda reason: content["rejected"][reason])
    sentence = (
        f"{rejected:,} of {count_noun(samples, 'sample')} ({rejected / samples:.1%}) are rejected, most as {most}."
    )
    return [Finding(code="rejects", severity="warning", sentence=sentence, command="latentmill retry {cache}")]


def find_enlarged(content: Mapping[str, Any]) -> list[Finding]:
    """Return a finding if more than a quarter of the images were enlarged."""
    if content["enlarged"] <= ENLARGED_SHARE * content["count"]:
        return []
    share = content["enlarged"] / content["count"]
    sentence = (
        f"{share:.0%} of the images were enlarged to the resolution, which blurs them; --min-size leaves them out."
    )
    return [Finding(code="enlarged", severity="note", sentence=sentence)]


def compare_with_constants(mean: Sequence[float], std: Sequence[float], vae: VaeInfo) -> list[Finding]:
    """Return at most one finding: how the channels disagree with the constants of the VAE.

    mean, std: of each raw channel.
    """
    means, stds = (np.array(values) for values in expect_channels(vae, len(mean)))
    measured = np.array(std)
    if len(means) != len(mean) or not measured.all():
        return []
    scaled, expected = np.log(measured), np.log(stds)
    if np.median(abs(scaled)) < NEAR_ONE and np.median(abs(scaled - expected)) > FAR:
        sentence = (
            "The stored latents have a standard deviation of about 1, as if they were scaled already: "
            "a trainer would scale them again."
        )
        return [Finding(code="wrong-scaling", severity="error", sentence=sentence, command="latentmill stats {cache}")]
    shifts = (np.array(mean) - means) / stds
    if pool_patches(vae)[0] and (swapped := find_swapped(shifts, np.array(mean), scaled, means, stds)):
        sentence = f"Channels {join(swapped)} have each other's mean and deviation: the channels look swapped."
        return [
            Finding(code="swapped-channels", severity="error", sentence=sentence, command="latentmill stats {cache}")
        ]
    ratio = float(np.exp(np.median(scaled - expected)))
    if ratio < NARROW:
        sentence = (
            f"The latents vary {ratio:.2f} times as much as the constants of {vae.reference} say. Images with values "
            "of [0, 1] instead of [-1, 1] look like this, and so do images of low contrast."
        )
        return [Finding(code="wrong-range", severity="warning", sentence=sentence, command="latentmill stats {cache}")]
    if ratio > WIDE or np.median(abs(shifts)) > SHIFTED:
        sentence = (
            f"The mean or the deviation of the latents is far from the constants of {vae.reference} (deviation "
            f"{ratio:.2f} times, mean off by {np.median(abs(shifts)):.1f} deviations): another VAE, or unusual images."
        )
        return [Finding(code="other-vae", severity="warning", sentence=sentence, command="latentmill stats {cache}")]
    return []


def find_swapped(
    shifts: np.ndarray, mean: np.ndarray, scaled: np.ndarray, means: np.ndarray, stds: np.ndarray
) -> list[int]:
    """Return the pairs of channels that fit each other's constants, and not their own."""
    distance = abs(mean[:, None] - means[None]) / stds[None] + abs(scaled[:, None] - np.log(stds)[None])
    own = np.diag(distance)
    swapped: list[int] = []
    for first in range(len(mean)):
        for second in range(first + 1, len(mean)):
            fits = max(distance[first, second], distance[second, first]) < 0.3
            if fits and min(own[first], own[second]) > 1.0 and not {first, second} & set(swapped):
                swapped += [first, second]
    return swapped


def join(numbers: Sequence[int]) -> str:
    """Return numbers as a text: `1, 2 and 3`."""
    texts = [str(number) for number in numbers]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)

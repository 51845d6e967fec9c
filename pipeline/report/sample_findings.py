"""Findings of a sample of rows: values, duplicates, constant images, captions, and units whose rows differ."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from pipeline.report.findings import MAX_EXAMPLES, Example, Finding
from pipeline.report.sample import Sample
from pipeline.wording import count_noun

FLAT = 0.04  # the deviation within a constant image's latent, in expected deviations
NEAR = 0.06  # the distance of near duplicates' signatures, relative to the distance of unrelated images
MAX_NEAR = 20_000  # rows that are compared with each other; of more, only equal latents are found
BLOCK = 1000  # rows of a block of distances
ROUGH = 1.0  # of noise 1.13 +- 0.05; of images seldom more than 0.9
NOISY_SHARE = 0.9  # of a file's rows
FAR = 12.0  # median absolute deviations
CLIPPED = 0.05
MISSING_SHARE, REPEATED_SHARE, DUPLICATE_SHARE = 0.01, 0.05, 0.002
ENLARGED = 2.0


def find_in_sample(sample: Sample) -> list[Finding]:
    """Return the findings of a sample."""
    constant = set(np.flatnonzero(sample.flatness < FLAT).tolist())
    return [
        *find_not_finite(sample),
        *find_clipped(sample, constant),
        *find_constant(sample, constant),
        *find_duplicates(sample, constant),
        *find_noise(sample),
        *find_outliers(sample),
        *find_captions(sample),
        *find_most_enlarged(sample),
    ]


def show(sample: Sample, rows: Iterable[int], remarks: Sequence[str] = ()) -> tuple[Example, ...]:
    """Return the first rows as examples."""
    chosen = list(rows)[:MAX_EXAMPLES]
    return tuple(
        Example(
            key=sample.keys[row],
            shard=sample.shards[row],
            remark=remarks[number] if remarks else "",
            places=((sample.file[row], sample.index[row]),),
        )
        for number, row in enumerate(chosen)
    )


def describe_share(sample: Sample, count: int) -> str:
    """Return `3 of 2,000 rows`, and that they are a sample if they are."""
    rows = f"{count:,} of {count_noun(len(sample), 'row')}"
    return rows if len(sample) == sample.total else f"{rows} of the sample"


def find_not_finite(sample: Sample) -> list[Finding]:
    """Return a finding if a latent has NaN or infinity."""
    rows = np.flatnonzero(~sample.finite)
    if not len(rows):
        return []
    sentence = f"{describe_share(sample, len(rows))} have values that are not finite: they end a training run."
    return [
        Finding(
            code="not-finite",
            severity="error",
            sentence=sentence,
            examples=show(sample, rows),
            command="latentmill verify {cache}",
        )
    ]


def find_clipped(sample: Sample, constant: set[int]) -> list[Finding]:
    """Return a finding if many values of a channel equal its extremes, though the image is not constant."""
    rows = [row for row in np.flatnonzero(sample.clipped > CLIPPED).tolist() if row not in constant]
    if len(rows) < max(2, 0.05 * len(sample)):
        return []
    sentence = f"{describe_share(sample, len(rows))} have a channel with many equal extremes: it is saturated."
    return [Finding(code="saturated-channel", severity="warning", sentence=sentence, examples=show(sample, rows))]


def find_constant(sample: Sample, constant: set[int]) -> list[Finding]:
    """Return a finding if images are of one colour."""
    if not constant:
        return []
    sentence = f"{describe_share(sample, len(constant))} are of images of one color; --min-std leaves them out."
    return [
        Finding(code="constant-images", severity="warning", sentence=sentence, examples=show(sample, sorted(constant)))
    ]


def find_duplicates(sample: Sample, constant: set[int]) -> list[Finding]:
    """Return findings of equal latents, and of latents that are nearly equal. Constant images do not count."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for row, digest in enumerate(sample.hashes):
        if row not in constant:
            groups[digest].append(row)
    pairs = [(rows[0], row) for rows in groups.values() for row in rows[1:]]
    found = _describe_pairs(sample, "duplicates", "the latent of another row: the same image twice", pairs)
    distinct = [rows[0] for rows in groups.values()]
    if len(distinct) <= MAX_NEAR:
        near = find_near_pairs(sample.signature[distinct])
        pairs = [(distinct[first], distinct[second]) for first, second in near]
        found += _describe_pairs(sample, "near-duplicates", "nearly the latent of another row", pairs)
    return found


def _describe_pairs(sample: Sample, code: str, what: str, pairs: Sequence[tuple[int, int]]) -> list[Finding]:
    copies = len({second for _, second in pairs})
    if copies <= DUPLICATE_SHARE * len(sample):
        return []
    sentence = f"{describe_share(sample, copies)} ({copies / len(sample):.1%}) have {what}."
    shown = pairs[:MAX_EXAMPLES]
    remarks = [f"like {sample.keys[first]} in {sample.shards[first]}" for first, _ in shown]
    copied = show(sample, [second for _, second in shown], remarks)
    originals = show(sample, [first for first, _ in shown])
    examples = tuple(
        replace(copy, places=original.places + copy.places) for original, copy in zip(originals, copied, strict=True)
    )
    return [Finding(code=code, severity="warning", sentence=sentence, examples=examples)]


def find_near_pairs(signature: np.ndarray) -> list[tuple[int, int]]:
    """Return the pairs of rows whose signatures [N, D] are much nearer to each other than is usual."""
    squares = np.square(signature).sum(axis=1)
    usual = 2 * float(np.median(np.square(signature - np.median(signature, axis=0)).sum(axis=1)))
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(signature), BLOCK):
        block = signature[start : start + BLOCK]
        distance = squares[start : start + BLOCK, None] + squares[None] - 2 * block @ signature.T
        first, second = np.nonzero(distance < NEAR**2 * usual)
        pairs += [(int(a) + start, int(b)) for a, b in zip(first, second, strict=True) if a + start < b]
    return pairs


def find_noise(sample: Sample) -> list[Finding]:
    """Return a finding if the latents of whole files are noise: their neighbouring values are not alike."""
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, file in enumerate(sample.file):
        rows_of[file].append(row)
    noisy = {
        file: [row for row in rows if sample.roughness[row] > ROUGH]
        for file, rows in rows_of.items()
        if np.mean(sample.roughness[rows] > ROUGH) >= NOISY_SHARE
    }
    if not noisy or len(noisy) > len(rows_of) / 2:
        return []
    rows = [row for group in noisy.values() for row in group]
    sentence = (
        f"The latents in {count_noun(len(noisy), 'file')}, such as {next(iter(noisy))}, are noise, those of other "
        "files are not: a worker may be broken."
    )
    return [
        Finding(
            code="noisy-unit",
            severity="error",
            sentence=sentence,
            examples=show(sample, rows, [sample.file[row] for row in rows]),
            command="latentmill verify {cache} --reencode 100",
        )
    ]


def find_outliers(sample: Sample) -> list[Finding]:
    """Return a finding of rows whose mean or deviation is far outside that of the other rows."""
    values = np.concatenate([sample.mean, np.log(np.maximum(sample.std, 1e-6))], axis=1)
    middle = np.median(values, axis=0)
    width = np.maximum(1.4826 * np.median(abs(values - middle), axis=0), 1e-6)
    distance = np.median(abs(values - middle) / width, axis=1)
    rows = np.argsort(-distance)[: int((distance > FAR).sum())]
    if not len(rows):
        return []
    sentence = f"The values of {describe_share(sample, len(rows))} are far outside those of the others."
    remarks = [f"{distance[row]:.0f} deviations" for row in rows]
    return [Finding(code="outliers", severity="note", sentence=sentence, examples=show(sample, rows.tolist(), remarks))]


def find_captions(sample: Sample) -> list[Finding]:
    """Return findings of captions that are missing, or the same for many rows."""
    if sample.captions is None:
        return []
    command = "latentmill annotate {cache} --refresh-columns"
    texts = [str(text or "").strip() for text in sample.captions]
    missing = [row for row, text in enumerate(texts) if not text]
    found = []
    if len(missing) > MISSING_SHARE * len(sample):
        sentence = f"{describe_share(sample, len(missing))} have no caption ({len(missing) / len(sample):.0%})."
        examples = show(sample, missing)
        found.append(
            Finding(code="missing-captions", severity="warning", sentence=sentence, examples=examples, command=command)
        )
    counts = Counter(text for text in texts if text)
    text, count = counts.most_common(1)[0] if counts else ("", 0)
    if count > max(2, REPEATED_SHARE * len(sample)):
        sentence = f"{describe_share(sample, count)} have the same caption."
        examples = show(sample, [row for row, each in enumerate(texts) if each == text], [text] * MAX_EXAMPLES)
        found.append(
            Finding(code="repeated-captions", severity="warning", sentence=sentence, examples=examples, command=command)
        )
    return found


def find_most_enlarged(sample: Sample) -> list[Finding]:
    """Return a finding of images that were enlarged to more than twice their size, the largest factor first."""
    rows = np.argsort(-sample.scale)[: int((sample.scale > ENLARGED).sum())].tolist()
    if not rows:
        return []
    sentence = f"{describe_share(sample, len(rows))} are of images that were enlarged more than {ENLARGED:g} times."
    remarks = [f"{sample.scale[row]:.1f} times" for row in rows]
    return [Finding(code="enlarged-most", severity="note", sentence=sentence, examples=show(sample, rows, remarks))]

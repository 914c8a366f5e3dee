"""What the name of a folder says of the images in it."""

from __future__ import annotations

import re

_PARTS = frozenset(
    ("train", "test", "groundtruth", "testpublic", "testprivate", "testprivatemixed")
)
GOOD_NAMES = frozenset(
    "good ok okay normal io pass passed fine healthy nominal intact flawless gut "
    "nodefect nodefects defectfree nondefective notdefective withoutdefect withoutdefects "
    "noanomaly anomalyfree nonanomalous".split()
)
# Words in the name of a folder by which not all images below it are good.
_NOT_GOOD = frozenset(
    "abnormal anomalies anomalous anomaly bad broken damaged def defect defective defects error "
    "errors fail failed failure fault faults faulty flaw flawed flaws ko mask masks ng nio nok "
    "reject rejected rejects scrap".split()
)
_NEGATIONS = frozenset("no non not nicht un without".split())
_NEARLY = frozenset(("good", "ok", "okay", "normal"))


def plain_name(name: str) -> str:
    """A name without case and separators: "groundtruth" of "Ground-Truth" and "ground_truth"."""
    return re.sub(r"[ _.-]+", "", name.casefold())


def words(name: str) -> frozenset[str]:
    """The words of a name, in lower case."""
    return frozenset(re.split(r"[^a-z]+", name.lower())) - {""}


def is_good_name(name: str) -> bool:
    """Whether a folder or label so named stands for good images: "good", "OK", "defect-free"."""
    return plain_name(name) in GOOD_NAMES


def is_nearly_good_name(name: str) -> bool:
    """Whether a name holds a word for good images and more, and could mean either: "ok_front"."""
    found = words(name)
    return not is_good_name(name) and bool(found & _NEARLY) and not found & (_NOT_GOOD | _NEGATIONS)


def says_not_good(name: str) -> bool:
    """Whether a folder so named is a part of a data set, or not all images below it are good."""
    if is_good_name(name):
        return False
    return plain_name(name) in _PARTS or not words(name).isdisjoint(_NOT_GOOD)

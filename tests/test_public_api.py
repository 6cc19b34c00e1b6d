"""No public name or argument changes by accident."""

import difflib

import public_api


def test_the_public_api_is_that_of_the_snapshot():
    before, now = public_api.SNAPSHOT.read_text().splitlines(), list(public_api.lines())
    changed = [
        line for line in difflib.unified_diff(before, now, lineterm="", n=0) if line[:2] not in ("--", "++")
    ]
    assert not changed, (
        "if this is meant: python tests/public_api.py, and a line in CHANGELOG.md\n" + "\n".join(changed)
    )


def test_every_public_name_of_the_package_is_listed():
    listed = {line.split("(")[0] for line in public_api.lines()}
    assert {
        "jaxeff.analyze",
        "jaxeff.prune.masks",
        "jaxeff.Report.to_json",
        "jaxeff.checkpoints.prune_checkpoint",
    } <= listed

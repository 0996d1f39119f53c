"""benchmarks.validate: which reports of the tests marked `gpu` validate which kernels."""

from __future__ import annotations

import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import validate

ROOT = Path(__file__).parents[1]

REPORT = """
<testsuites><testsuite><properties>
<property name="mode" value="compiled" /><property name="architecture" value="sm_90" />
<property name="device" value="NVIDIA H100" /><property name="ptxas" value="13.0" />
</properties>
<testcase classname="tests.test_box_position_embed" name="a" />
<testcase classname="tests.test_box_position_embed" name="b"><skipped /></testcase>
<testcase classname="tests.test_refine_boxes" name="a" />
<testcase classname="tests.test_refine_boxes" name="b"><failure /></testcase>
<testcase classname="tests.test_native" name="a"><skipped /></testcase>
<testcase classname="tests.test_triton_decoder" name="a" />
</testsuite></testsuites>
"""
TESTS = {f"tests.test_{test}" for test in ("box_position_embed::a", "box_position_embed::b", "refine_boxes::a")}
TESTS |= {f"tests.test_{test}" for test in ("refine_boxes::b", "native::a", "triton_decoder::a")}


@pytest.fixture
def main(monkeypatch, tmp_path):
    """Runs the command on a report, where TESTS are the checkout's; returns what it wrote or why it refused."""
    monkeypatch.setattr(validate, "collected", lambda: TESTS)

    def run(text):
        path, out = tmp_path / "tests.xml", tmp_path / "validated.json"
        path.write_text(text)
        try:
            validate.main([str(path), "--backends", "triton", "native", "--out", str(out)])
        except SystemExit as error:
            reason = error.code
        else:
            return json.loads(out.read_text())
        assert not out.exists() and "\n" not in reason
        return reason

    return run


def test_only_what_passed_is_validated(main):
    kept = dict.fromkeys(validate.KEPT, "") | {"device": "NVIDIA H100", "ptxas": "13.0", "tests": 2}
    assert main(REPORT) == {"box_position_embed": {"triton": {"sm_90": kept}}}


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ('decoder" name="a" />', 'decoder" name="a"><error /></testcase>', "of every op a test failed, or none ran"),
        ('name="mode"', 'name="other"', "the report does not say how Triton's kernels ran"),
        ('value="compiled"', 'value="interpreted"', "the report is of interpreted kernels"),
        ('name="architecture"', 'name="other"', "the report is of a run without a GPU, on NVIDIA H100"),
        (
            '<testcase classname="tests.test_refine_boxes" name="b">',
            '<testcase classname="tests.test_refine_boxes" name="another">',
            "the report lacks 1 of the 6 tests marked gpu, such as tests.test_refine_boxes::b",
        ),
        ("</testsuites>", "", "is no JUnit report of a run that came to its end: no element found"),
    ],
)
def test_a_report_that_proves_nothing_is_refused(main, old, new, reason):
    assert old in REPORT
    said = main(REPORT.replace(old, new))
    assert said.startswith("nothing is validated: ") and reason in said


def test_no_report_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"^nothing is validated: .*none\.xml is no JUnit report"):
        validate.main([str(tmp_path / "none.xml")])


def test_names_in_a_report():
    assert validate.reported("tests/test_a.py::test_b[x::y/z.py]") == "tests.test_a::test_b[x::y/z.py]"
    assert validate.reported("tests/test_a.py::TestC::test_b") == "tests.test_a.TestC::test_b"


def test_every_kernel_has_its_proof():
    for op, backend in validate.PROOFS:
        assert importlib.util.find_spec(f"dab_fast.backends.{backend}.{op}"), (op, backend)
    for files in validate.PROOFS.values():
        assert all((ROOT / "tests" / f"{file}.py").exists() for file in files)


def test_errors_count_as_failures():
    report = ElementTree.ElementTree(ElementTree.fromstring(REPORT.replace("failure", "error")))
    assert validate.outcomes(report)["test_refine_boxes"] == (1, 1)

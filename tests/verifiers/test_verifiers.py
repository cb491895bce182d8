"""The ready verifiers say yes to what is right and no to what is not."""

import pytest

from tessy_hf import demo
from tessy_hf.errors import SettingsError
from tessy_hf.verifiers import verifiers
from tessy_hf.verifiers.verifiers import Exact, MathVerify, Number, PythonTests
from tests.verifiers.test_sandbox import permitted

needs_a_sandbox = pytest.mark.skipif(
    not permitted("namespaces") and not permitted("landlock"), reason="this system has no means for a sandbox"
)


def says(verifier, answer, expected):
    return verifier({"answer": answer, verifier.column: expected})


RIGHT = [
    (Exact(), "the answer is 4 .", "the answer is 4 .", True),
    (Exact(), "  the answer\nis 4 . ", "the answer is 4 .", True),
    (Exact(), "The answer is 4 .", "the answer is 4 .", False),
    (Exact(), "", "4", False),
    (Exact(), "4", 4, True),
    (Number(), "so 3 + 4 = 7.", "7", True),
    (Number(), "7 apples, no, 8.", "7", False),
    (Number(), "It costs $1,234.50", "1234.5", True),
    (Number(), "-3", "3", False),
    (Number(), "2e3", 2000, True),
    (Number(), ".5", "the half, 0.5", True),
    (Number(), "none", "7", False),
    (Number(), "x = \N{MINUS SIGN}5", "5", False),
    (Number(), "x = \N{MINUS SIGN}5", "-5", True),
]


@pytest.mark.parametrize(("verifier", "answer", "expected", "right"), RIGHT)
def test_texts_and_numbers(verifier, answer, expected, right):
    assert says(verifier, answer, expected) is right


def test_a_reference_without_a_number_is_told():
    with pytest.raises(ValueError, match="'reference_answer' is 'none', in which there is no number"):
        says(Number(), "7", "none")


@pytest.mark.parametrize("verifier", [Exact(), Number(), MathVerify()])
def test_a_row_without_a_reference_is_told(verifier):
    with pytest.raises(ValueError, match="'reference_answer' is None"):
        says(verifier, "None", None)


MATH = [
    (r"so it is $\boxed{\frac{1}{2}}$", "0.5", True),
    (r"$x = \frac{2}{4}$", r"\frac{1}{2}", True),
    (r"$\boxed{0.5}$", r"\frac{1}{3}", False),
    (r"$\boxed{(1, 2]}$", "(1,2]", True),
    ("I do not know", "3", False),
]


@pytest.mark.slow
def test_math_verify():
    pytest.importorskip("math_verify")
    MathVerify().check()
    assert [says(MathVerify(), answer, expected) for answer, expected, _ in MATH] == [right for *_, right in MATH]
    with pytest.raises(ValueError, match="math-verify cannot read"):
        says(MathVerify(), "$1$", "")


def test_math_verify_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(verifiers, "_MATH", "import no_such_module")
    with pytest.raises(SettingsError, match=r"tessy-hf\[math\]"):
        MathVerify().check()


ADD = "Here it is:\n```python\nimport sys\ndef add(a, b):\n    return a + b\n```\nDone."
ECHO = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"


@pytest.mark.slow
@needs_a_sandbox
@pytest.mark.parametrize(
    ("answer", "tests", "right"),
    [
        (ADD, "assert add(1, 2) == 3", True),
        (ADD, "assert add(1, 2) == 4", False),
        (ADD.replace("a + b", "a - b"), "assert add(1, 2) == 3", False),
        ("no program", "assert True", False),
        (ADD.replace("import sys", "import sys; sys.exit(0)"), "assert add(1, 2) == 4", False),
        (ADD + "\n```python\ndef add(a, b):\n    return 0\n```", "assert add(1, 2) == 3", False),  # the last counts
        (ADD.replace("return", "while True: pass"), "assert add(1, 2) == 3", False),
        (ADD + "\n```python\nprint('x')\nif __name__ == '__main__':\n    input()\n```", "assert True", True),
        (ECHO, [{"input": "1 2\n", "output": "3\n"}, {"input": "4 5", "output": "9  "}], True),
        (ECHO, [{"input": "1 2", "output": "3"}, {"input": "4 5", "output": "8"}], False),
        (ECHO, [{"input": "", "output": "3"}], False),
        (ECHO, '[{"input": "1 2", "output": "3"}]', True),
        (ECHO, '[{"input": "1 2", "output": "4"}]', False),  # as code, a list passes whatever was written
    ],
)
def test_python_tests(answer, tests, right):
    assert says(PythonTests(seconds=3.0), answer, tests) is right


@pytest.mark.parametrize(
    "tests",
    ["", " \n", [], None, 3, '{"inputs": ["1"], "outputs": ["2"]}', "[]", ["x"], [{"in": "1"}], [{"input": "1"}],
     [{"input": 1, "output": 2}]],
)  # fmt: skip
def test_a_column_without_tests_is_told(tests):
    with pytest.raises(ValueError, match="'tests' is"):
        says(PythonTests(), ADD, tests)


def test_programs_that_cannot_run_here_are_told_before_a_run():
    if not needs_a_sandbox.args[0]:
        PythonTests().check()
        with pytest.raises(SettingsError, match="simplest program"):
            PythonTests(memory_mb=1).check()


@needs_a_sandbox
def test_a_run_does_not_start_with_a_verifier_that_does_not_work():
    prompts = demo.prompts(1).add_column("tests", ["assert True"])
    verifier = {"name": "python-tests", "memory_mb": 1}
    with demo.transform(verifier=verifier, journal=None) as transform, pytest.raises(SettingsError, match="simplest"):
        transform(prompts[:])

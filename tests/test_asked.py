"""Only what a method asks is wanted, loaded and started."""

import pytest

from tessy_hf import ServerEngine, Speaker, TessyTransform, TransformersEngine, demo
from tessy_hf.errors import EngineDeadError, SettingsError
from tests.cli.test_cli import tessy as tessy  # noqa: PLC0414 - a fixture

SETTINGS = {"journal": None, "id_column": "id", "max_thinking_tokens": 20, "max_answer_tokens": 4}

TEACHER_ONLY = """
method: teacher-only
teacher: {model: demo:teacher}
student: {engine: tokenizer, model: demo:student}
"""


class Forbidden(TransformersEngine):
    """A miniature model that may not be loaded."""

    async def start(self):
        raise AssertionError(f"{self.model} was started")


def absent():
    """A model on a server that is not there, and a predictor that does not exist."""
    engine = ServerEngine("student", base_url="http://127.0.0.1:9/v1", tokenizer="demo:student", retry_timeout=0.1)
    return Speaker(engine, "/no/such/predictor")


@pytest.fixture
def loaded(monkeypatch):
    """The networks that are loaded."""
    from transformers import PreTrainedModel

    names, load = [], PreTrainedModel.from_pretrained.__func__

    def noted(cls, name, *args, **options):
        names.append(str(name).rpartition("/")[2])
        return load(cls, name, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(noted))
    return names


def rows_of(**speakers):
    with TessyTransform(**speakers, **SETTINGS) as transform:
        return list(transform.map(demo.prompts(2, seed=4)))


@pytest.mark.parametrize("teacher", [None, "demo:teacher", Forbidden("demo:teacher"), absent()], ids=type)
def test_student_only_loads_the_student_alone(loaded, teacher):
    student = Speaker(TransformersEngine("demo:student"), "demo:boundary-student")
    rows = rows_of(teacher=teacher, student=student, method="student-only")
    assert loaded == ["student"] and all(row["student_tokens"] for row in rows)
    assert {row["run_fingerprint"] for row in rows} == {
        TessyTransform(student="demo:student", method="student-only", **SETTINGS).run_fingerprint
    }


@pytest.mark.parametrize("student", ["demo:student", Forbidden("demo:student"), absent()], ids=type)
def test_teacher_only_loads_the_teacher_and_the_students_tokenizer(loaded, student):
    rows = rows_of(teacher="demo:teacher", student=student, method="teacher-only")
    assert loaded == ["teacher"] and all(row["teacher_tokens"] for row in rows)
    same = TessyTransform(teacher="demo:teacher", student="demo:student", method="teacher-only", **SETTINGS)
    assert {row["run_fingerprint"] for row in rows} == {same.run_fingerprint}
    assert same.record().student.engine == "tokenizer" and same.record().student.model.name == "demo:student"


@pytest.mark.parametrize("method", ["tessy", "teacher-only", "teacher-mix", "teacher-reference", "teacher-score"])
def test_a_teacher_that_is_needed_is_asked_for(method):
    with pytest.raises(SettingsError, match=rf"'{method}' needs a teacher and got none.*student-only"):
        TessyTransform(student="demo:student", method=method)


def test_a_teacher_comes_back_with_a_method_that_needs_it():
    transform = demo.transform(method="student-only")
    assert transform.with_settings(method="tessy").run_fingerprint == demo.transform().run_fingerprint


def test_a_model_of_which_only_the_tokenizer_is_there_writes_nothing():
    from tessy_hf.engines.tokenizer_only import TokenizerOnly

    transform = TessyTransform(student=TokenizerOnly("demo:student"), method="student-only", **SETTINGS)
    with transform, pytest.raises(EngineDeadError, match="of which only the tokenizer is used"):
        transform(demo.prompts(1)[:])


def test_a_recipe_needs_no_teacher_either(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: student-only\nstudent: {model: demo:student}\n")
    assert TessyTransform.from_yaml(recipe).record().teacher is None
    with pytest.raises(SettingsError, match="has no `teacher`"):
        TessyTransform.from_yaml(recipe, "method=tessy")
    recipe.write_text(TEACHER_ONLY)
    assert TessyTransform.from_yaml(recipe).record().student.engine == "tokenizer"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "network"),
    [
        ("method: student-only\nstudent: {model: demo:student}\n", "student"),
        (TEACHER_ONLY, "teacher"),
    ],
)
def test_the_command_loads_one_model_alone(loaded, tessy, tmp_path, recipe, network):
    (tmp_path / "recipe.yaml").write_text(f"{recipe}max_thinking_tokens: 20\nmax_answer_tokens: 4\n")
    demo.prompts(2, seed=4).to_json(tmp_path / "prompts.jsonl")
    code, printed = tessy("synthesize", tmp_path / "recipe.yaml", tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl")
    assert code == 0 and loaded == [network] and f"Loading weights: {network} demo:{network}\n" in printed

"""A run described in YAML is read whole, and a fault in it is told with its place."""

from pathlib import Path

import pytest
import yaml

from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.engines.transformers import TransformersEngine
from tessy_hf.errors import SettingsError
from tessy_hf.method.rules.entropy import Entropy
from tessy_hf.method.rules.every import Every
from tessy_hf.recipe import ENGINES, read
from tessy_hf.settings import Settings
from tessy_hf.text.thinking_format import NONE, ThinkingFormat

RECIPE = """
method: tessy
chunk_tokens: 12
temperature: 0.0
teacher:
  engine: transformers
  model: Qwen/Qwen3-8B
  options: {dtype: float32, max_batch: 3}
  boundary: {model: me/boundary-teacher, label_shift: 0, style_label: 1, window: 64, revision: v1, device: cpu}
  template_options: {enable_thinking: true}
student:
  engine: transformers
  model: Qwen/Qwen3-0.6B
  boundary: me/boundary-student
  chat_template: "<think>{{ messages }}"
"""


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe: RECIPE with changes, each a path of keys and a new value (or ... to take it out)."""

    def write(*changes, text=None):
        described = yaml.safe_load(RECIPE)
        for *path, name, value in changes:
            place = described
            for key in path:
                place = place[key]
            if value is ...:
                del place[name]
            else:
                place[name] = value
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(described) if text is None else text, encoding="utf-8")
        return file

    return write


def test_a_recipe_is_read_whole(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(RECIPE)
    teacher, student, settings = read(file)
    assert settings == {"method": "tessy", "chunk_tokens": 12, "temperature": 0.0}
    assert isinstance(teacher.engine, TransformersEngine) and isinstance(teacher.boundary, BoundaryPredictor)
    assert (teacher.engine.model, teacher.engine.identity["dtype"]) == ("Qwen/Qwen3-8B", "float32")
    assert (student.engine.model, student.engine.identity["dtype"]) == ("Qwen/Qwen3-0.6B", "auto")
    assert teacher.boundary.identity == {
        "model": "me/boundary-teacher",
        "revision": "v1",
        "label_shift": 0,
        "style_label": 1,
        "window": 64,
    }
    assert student.boundary.identity == BoundaryPredictor("me/boundary-student").identity
    assert (teacher.template_options, teacher.chat_template) == ({"enable_thinking": True}, None)
    assert (student.template_options, student.chat_template) == ({}, "<think>{{ messages }}")


def test_a_recipe_without_predictors_is_read_for_methods_that_do_not_alternate(recipe):
    file = recipe(("method", "student-only"), ("teacher", "boundary", ...), ("student", "boundary", ...))
    teacher, student, settings = read(file)
    assert (teacher.boundary, student.boundary, settings["method"]) == (None, None, "student-only")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (("teacher", ...), ["no `teacher`", "method 'tessy' needs one", "student-only"]),
        (("student", ...), ["at student", "field required"]),
        (("student", "model", ...), ["student.model", "field required"]),
        (("teacher", "modl", "x"), ["teacher.modl", "not permitted", "Did you mean 'model'?"]),
        (("teachr", {}), ["unknown key 'teachr'. Did you mean 'teacher'?"]),
        (("teacher", "boundary", {"label_shift": 0}), ["teacher.boundary", "field required"]),
        (
            ("teacher", "boundary", {"model": "m", "label_shft": 0}),
            ["teacher.boundary", "label_shft", "not permitted", "Did you mean 'label_shift'?"],
        ),
        (("teacher", "options", [1]), ["teacher.options", "valid dictionary"]),
        (("student", "Qwen/Qwen3-0.6B"), ["student", "dictionary"]),
        (("teacher", "engine", "magic"), ["'magic'", *ENGINES]),
        (("teacher", "engine", "vlm"), ["Did you mean 'vllm'?"]),
        (("teacher", "options", {"model": "x"}), ["options that the engine does not accept", "model"]),
        (("teacher", "options", {"max_batch": 0}), ["max_batch is 0", "max_batch=64"]),
        (("chunk_token", 3), ["chunk_token", "Did you mean 'chunk_tokens'?"]),
        (("chunk_tokens", 0), ["chunk_tokens=0", "greater than or equal to 1", "Pass for instance"]),
        ((55555, "x"), ["at 55555"]),
    ],
)
def test_a_fault_in_a_recipe_is_told_with_its_place(recipe, change, shown):
    with pytest.raises(SettingsError) as caught:
        read(recipe(change))
    for text in shown:
        assert text in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a\n- list", "just words", "42"])
def test_a_file_that_is_no_description_is_told(recipe, text):
    with pytest.raises(SettingsError) as caught:
        read(recipe(text=text))
    for shown in ("recipe.yaml", "the file", "`teacher` and `student` with `engine`, `model`"):
        assert shown in str(caught.value)


@pytest.mark.parametrize("content", [b"teacher: [", b"a: b: c", b"\ttabs: 1", b"\xff\xfe\x00"])
def test_a_file_that_is_not_yaml_is_told(tmp_path, content):
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=r"broken\.yaml' cannot be read: (?s:.*)A YAML file is expected"):
        read(file)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.yaml' cannot be read"):
        read(tmp_path / "nowhere.yaml")


def test_a_recipe_may_name_or_describe_thinking_formats(recipe):
    own = {"open": "<r>", "close": "</r>", "end_marker": "</r>", "key": "reasoning"}
    teacher, student, _ = read(recipe(("teacher", "thinking_format", "none"), ("student", "thinking_format", own)))
    assert teacher.given_format is NONE
    assert student.given_format == ThinkingFormat("<r>", "</r>", "</r>", "reasoning")


def test_yaml_cannot_make_objects(tmp_path):
    file = tmp_path / "evil.yaml"
    file.write_text("teacher: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(SettingsError, match="cannot be read"):
        read(file)


def test_reading_a_recipe_loads_no_model(recipe):
    teacher, student, _ = read(recipe(("teacher", "model", "no/such-model")))
    assert teacher.engine.model == "no/such-model"
    assert "me/boundary-student" in repr(student.boundary)


def test_a_recipe_can_be_changed_by_dotted_names(tmp_path):
    recipe = Path(__file__).parent.parent / "recipes" / "miniature" / "tessy.yaml"
    changes = ["temperature=0.25", "teacher.options.device=cpu", "id_column=null"]
    changed = read(recipe, changes)[2]
    assert (changed["temperature"], changed["id_column"]) == (0.25, None)
    with pytest.raises(SettingsError, match="is not an override: month must be in 1..12. A YAML value is expected"):
        read(recipe, ["id_column=2024-13-45"])
    with pytest.raises(SettingsError, match="'method.x=1' is not an override"):
        read(recipe, ["method.x=1"])


def test_a_misspelled_author_is_told_with_the_right_name(recipe):
    described = yaml.safe_load(RECIPE)
    with pytest.raises(SettingsError, match="Write 'student' in place of 'studnet'"):
        read(recipe(("student", ...), ("studnet", described["student"])))


def test_a_predictor_that_is_only_named_can_be_described_further(recipe):
    student = read(recipe(), ["student.boundary.label_shift=1"])[1]
    assert student.boundary.identity == BoundaryPredictor("me/boundary-student", label_shift=1).identity


def test_the_rule_of_who_writes_next_is_read_and_needs_no_predictors(recipe):
    bare = recipe(("teacher", "boundary", ...), ("student", "boundary", ...), ("switch", {"entropy": 1.5}))
    teacher, student, settings = read(bare)
    assert teacher.boundary is student.boundary is None
    assert Settings.check(**settings).switch == Entropy(threshold=1.5)
    *_, changed = read(recipe(), ["switch.every=4"])
    assert Settings.check(**changed).switch == Every(words=4)

"""What a speaker says of itself, and what can stand for one."""

import pytest

from tessy_hf import BoundaryPredictor, ScriptedEngine, ServerEngine, Speaker, TransformersEngine
from tessy_hf.errors import SettingsError
from tessy_hf.method.speaker import as_speaker


def test_reprs_name_the_model_and_what_was_given_and_no_secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server = Speaker(
        ServerEngine("me/model", base_url="http://s1:8000/v1"), "me/boundary", thinking_format="none",
        template_options={"reasoning_effort": "high"},
    )  # fmt: skip
    assert repr(server) == (
        "Speaker(ServerEngine('me/model', base_url=['http://s1:8000/v1']), boundary=BoundaryPredictor('me/boundary'), "
        "template_options={'reasoning_effort': 'high'}, thinking_format='none')"
    )
    assert repr(Speaker(TransformersEngine("me/model", token="hf_secret"))) == (
        "Speaker(TransformersEngine('me/model'))"
    )
    assert repr(Speaker(ScriptedEngine({}))) == "Speaker(ScriptedEngine('scripted'))"


def test_a_model_id_and_an_engine_stand_for_speakers():
    assert repr(as_speaker("Qwen/Qwen3-8B")) == "Speaker(TransformersEngine('Qwen/Qwen3-8B'))"
    assert repr(as_speaker(TransformersEngine("demo:teacher"))) == "Speaker(TransformersEngine('demo:teacher'))"
    speaker = Speaker(TransformersEngine("demo:teacher"), BoundaryPredictor())
    assert as_speaker(speaker) is speaker
    with pytest.raises(SettingsError, match="An engine is expected"):
        as_speaker(7)


def test_speakers_that_share_an_engine_keep_their_own_chat_templates():
    engine = ScriptedEngine({})
    template = engine.tokenizer.chat_template
    speakers = [Speaker(engine, chat_template=word + template) for word in ("first", "second")] + [Speaker(engine)]
    for _ in range(2):  # whichever of them rendered last
        prompts = [one.vocabulary.decode(one.open_turn([{"role": "user", "content": "hi"}])[0]) for one in speakers]
        assert prompts == ["first" + prompts[2], "second" + prompts[2], prompts[2]]
    assert engine.tokenizer.chat_template == template

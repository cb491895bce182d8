"""Bodies and answers of each protocol, without a server."""

import json
from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tessy_hf.engines import completions_api as api
from tessy_hf.engines.completions_api import (
    MOST_ROWS,
    MOST_STOP_TEXTS,
    PROTOCOLS,
    STREAMS,
    AnswerError,
    CompletionsAPI,
    EncodedPrompt,
)
from tests.engines.contract import TOKENIZER, VOCABULARY, request

ALL = pytest.mark.parametrize("protocol", PROTOCOLS)
IDS, TEXT = "generate", "text"


@pytest.fixture
def student():
    return CompletionsAPI("student", TOKENIZER)


def body(student, protocol, asked, **options):
    return json.loads(student.body(protocol, asked, **options))


# --- bodies


def test_each_protocol_asks_in_its_own_fields(student):
    asked = request(tokens=5, temperature=0.5, seed=7)
    ids, stop_ids = list(asked.prompt_ids), sorted(asked.stop_ids)
    generate = body(student, "generate", asked)
    sampling = generate.pop("sampling_params")
    seed = sampling.pop("seed")
    assert generate == {"model": "student", "token_ids": ids}
    assert sampling == {
        "max_tokens": 5, "temperature": 0.5, "top_p": 1.0, "stop_token_ids": stop_ids, "detokenize": False
    }  # fmt: skip
    common = {"model": "student", "max_tokens": 5, "temperature": 0.5, "top_p": 1.0, "seed": seed}
    assert body(student, "ids", asked) == {
        **common, "prompt": ids, "stop_token_ids": stop_ids, "return_token_ids": True
    }  # fmt: skip
    by_text = body(student, "ids-to-text", asked)
    stops = by_text.pop("stop")
    assert by_text == {**common, "prompt": ids} and stops[0] == "</think>"
    assert body(student, "text", asked) == {**common, "prompt": VOCABULARY.decode(ids), "stop": stops}


@ALL
def test_the_seed_depends_on_the_row_and_the_place_and_greedy_requests_have_none(student, protocol):
    def seed(**changes):
        given = body(student, protocol, replace(request(temperature=1.0, seed=1), **changes))
        given = given.get("sampling_params", given)
        return given.get("seed", given.get("sampling_seed"))

    ids = request().prompt_ids
    assert seed() == seed() and 0 <= seed() < 2**31
    assert len({seed(), seed(seed=2), seed(prompt_ids=array("i", [*ids, 5]))}) == 3
    assert not seed(temperature=0.0)


@pytest.mark.parametrize("protocol", sorted(STREAMS - {"deltas"}))
def test_a_stream_is_asked_for_by_name(student, protocol):
    plain, streamed = body(student, protocol, request()), body(student, protocol, request(), stream=True)
    assert streamed == {**plain, "stream": True} and "stream" not in plain


@pytest.mark.parametrize("protocol", sorted({*PROTOCOLS} - {"llama.cpp"}))
def test_further_sampling_is_sent_if_it_is_set(student, protocol):
    sampling = {"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.2}
    sent, plain = (body(student, protocol, request(**given)) for given in (sampling, {}))
    if protocol in ("generate", "sglang"):
        sent, plain = sent["sampling_params"], plain["sampling_params"]
    assert {name: sent[name] for name in sampling} == sampling
    assert not set(sampling) & set(plain)


def test_sglang_is_asked_by_its_own_names(student):
    asked = request(tokens=5, temperature=0.5, top_k=20)
    sent = body(student, "sglang", asked)
    sampling = sent.pop("sampling_params")
    assert sent == {"model": "student", "input_ids": list(asked.prompt_ids)}
    assert sampling.pop("sampling_seed") > 0 and sampling == {
        "max_new_tokens": 5, "temperature": 0.5, "top_p": 1.0, "top_k": 20, "stop_token_ids": sorted(asked.stop_ids)
    }  # fmt: skip


def test_llama_cpp_is_asked_by_its_own_names_and_its_own_sampling_defaults_are_switched_off(student):
    asked = request(tokens=5, temperature=0.5)
    sent = body(student, "llama.cpp", asked)
    assert sent["prompt"] == list(asked.prompt_ids) and sent["n_predict"] == 5 and sent["return_tokens"] is True
    assert (sent["temperature"], sent["top_p"], sent["top_k"], sent["min_p"]) == (0.5, 1.0, 0, 0.0)
    assert sent["stop"][0] == "</think>" and sent["preserved_tokens"] == sent["stop"]
    assert not {"repeat_penalty", "repeat_last_n"} & sent.keys()
    penalized = body(student, "llama.cpp", request(repetition_penalty=1.2, top_k=20, min_p=0.1))
    assert (penalized["repeat_penalty"], penalized["top_k"], penalized["min_p"]) == (1.2, 20, 0.1)
    assert penalized["repeat_last_n"] > len(asked.prompt_ids), "a penalty looks at the whole row"


def test_the_end_of_thinking_comes_first_among_the_few_stop_texts(student):
    many = frozenset(range(300, 320)) | {VOCABULARY.token_id("</think>"), TOKENIZER.eos_token_id}
    stops = body(student, "text", request(stop_ids=many))["stop"]
    assert len(stops) == MOST_STOP_TEXTS and TOKENIZER.eos_token not in stops
    assert body(student, "text", request(stop_ids=frozenset({VOCABULARY.token_id("</think>")})))["stop"] == [
        "</think>"
    ]
    assert "stop" not in body(student, "text", request(stop_ids=frozenset()))


class Prefixing:
    """A tokenizer that puts two ids before each text."""

    def __call__(self, text):
        encoded = TOKENIZER(text)
        encoded["input_ids"] = [304, 305, *encoded["input_ids"]]
        return encoded

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)


def test_what_the_servers_tokenizer_adds_is_left_out_of_a_text_prompt():
    prefixing, ids = CompletionsAPI("student", Prefixing()), list(request().prompt_ids)
    with_prefix = request(ids=array("i", [304, 305, *ids]))
    assert body(prefixing, "text", with_prefix)["prompt"] == VOCABULARY.decode(ids)
    assert body(prefixing, "text", request())["prompt"] == VOCABULARY.decode(ids)
    assert body(prefixing, "ids", with_prefix)["prompt"] == [304, 305, *ids]


EDITS = st.lists(st.tuples(st.integers(0, 12), st.lists(st.integers(0, 2**31 - 1), max_size=12)), max_size=12)


@given(EDITS, st.sampled_from([list, tuple, lambda ids: array("i", ids)]))
def test_an_encoded_prompt_is_the_json_of_its_ids_however_they_change(edits, kind):
    prompt, ids = EncodedPrompt(), []
    assert json.loads(prompt.update(kind(ids))) == []
    for removed, added in edits:
        del ids[max(0, len(ids) - removed) :]
        ids += added
        assert json.loads(prompt.update(kind(ids))) == ids
    assert json.loads(prompt.update(kind([1, 2, 3]))) == [1, 2, 3]


def test_rows_do_not_mix_and_more_rows_than_are_kept_are_encoded_anew(student):
    asked = [request(f"r{i}", ids=array("i", [i, 5, 6])) for i in range(MOST_ROWS + 10)]
    for each in [*asked, *asked[:20]]:
        assert body(student, "ids", each)["prompt"] == list(each.prompt_ids)
    student.release("r3")
    student.release("nobody")
    assert body(student, "ids", request("r3", ids=array("i", [9])))["prompt"] == [9]


# --- answers


def answer(**choice):
    return {"choices": [{"index": 0, "finish_reason": "length", **choice}]}


STOP = VOCABULARY.token_id("</think>")


def read(student, protocol, given, asked=None):
    completion = student.completion(protocol, given, asked or request())
    return list(completion.token_ids), completion.stop_id


def test_ids_end_before_the_first_stop(student):
    assert read(student, IDS, answer(token_ids=[304, 305])) == ([304, 305], None)
    assert read(student, IDS, answer(token_ids=[304, STOP, 305])) == ([304], STOP)
    assert read(student, IDS, answer(token_ids=[STOP], finish_reason="stop")) == ([], STOP)


def test_an_end_of_sequence_that_only_the_server_knows_is_no_text(student):
    assert read(student, IDS, answer(token_ids=[304, 7], finish_reason="stop")) == ([304], 7)


STOPS = ["stop", "STOP", "eos", "eos_token", "stop_token", "stop_sequence", "stop_str", "end_turn", "COMPLETE"]
LENGTHS = ["length", "max_tokens", "MAX_TOKENS", "max_length", "max_new_tokens", "model_length", "limit"]


@pytest.mark.parametrize("reason", [*STOPS, {"type": "stop", "matched": 5}])
def test_reasons_for_a_natural_end_go_by_several_names(student, reason):
    ids = VOCABULARY.encode(" okay").ids
    assert read(student, TEXT, answer(text=" okay", finish_reason=reason)) == (ids, TOKENIZER.eos_token_id)
    assert read(student, IDS, answer(token_ids=[304, 7], finish_reason=reason)) == ([304], 7)
    assert read(student, TEXT, answer(text="", finish_reason=reason)) == ([], TOKENIZER.eos_token_id)


@pytest.mark.parametrize("reason", [*LENGTHS, {"type": "length", "length": 8}])
def test_reasons_for_an_end_by_length_do_too(student, reason):
    ids = VOCABULARY.encode(" okay").ids
    assert read(student, TEXT, answer(text=" okay", finish_reason=reason)) == (ids, None)
    assert read(student, IDS, answer(token_ids=[304, 7], finish_reason=reason)) == ([304, 7], None)


@pytest.mark.parametrize("reason", ["abort", "error", "content_filter", None, "", 7, ["stop"], {}])
def test_a_text_with_another_reason_is_refused_by_it(student, reason):
    with pytest.raises(AnswerError, match="finish_reason") as caught:
        student.completion(TEXT, answer(text="okay", finish_reason=reason), request())
    assert str(reason) in str(caught.value)


def test_a_stop_left_in_the_text_is_cut_off(student):
    ids, stop_id = read(student, TEXT, answer(text=" okay\n</think>\n\n7"))
    assert VOCABULARY.decode(ids) == " okay\n" and stop_id is not None


def test_half_a_character_at_the_end_is_cut_off(student):
    assert read(student, TEXT, answer(text=" okay\ufffd")) == (VOCABULARY.encode(" okay").ids, None)


def test_a_text_that_is_too_long_is_cut(student):
    long = answer(text="okay so " * 50, finish_reason="stop")
    ids, stop_id = read(student, TEXT, long, request(tokens=5))
    assert len(ids) == 5 and stop_id is None


WRONG = {
    "no choices": ({"choices": []}, "sent 0 choices"),
    "another object": ({"ok": True}, "sent 0 choices"),
    "a list": ([1], "sent 0 choices"),
    "null": (None, "sent 0 choices"),
    "two choices": ({"choices": [{}, {}]}, "sent 2 choices"),
    "a choice of a wrong type": ({"choices": ["text"]}, "sent 1 choices, not one"),
    "no tokens": (answer(token_ids=[]), "without tokens of this vocabulary"),
    "floats": (answer(token_ids=[1.0]), "without tokens of this vocabulary"),
    "booleans": (answer(token_ids=[True]), "without tokens of this vocabulary"),
    "negative ids": (answer(token_ids=[-1]), "without tokens of this vocabulary"),
    "unknown ids": (answer(token_ids=[10**12]), "without tokens of this vocabulary"),
    "too many": (answer(token_ids=[1] * 9), "sent 9 tokens, 8 were asked for"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_an_answer_without_ids_is_refused(student, given, message):
    with pytest.raises(AnswerError, match=message):
        student.completion(IDS, given, request())


@pytest.mark.parametrize("text", [None, 7, "", "\ufffd"])
def test_an_answer_without_text_is_refused(student, text):
    with pytest.raises(AnswerError, match="without text|empty text"):
        student.completion(TEXT, answer(text=text), request())


def sglang(ids, total, reason=None, **meta):
    return {"output_ids": ids, "meta_info": {"completion_tokens": total, "finish_reason": reason, **meta}}


def test_native_answers_are_read_by_their_ids(student):
    told = {"prompt_tokens": 40, "cached_tokens": 32}
    completion = student.completion(
        "sglang", sglang([304, STOP], 2, {"type": "stop", "matched": STOP}, **told), request()
    )
    assert (completion.token_ids, completion.stop_id, completion.uncached_prompt_tokens) == ([304], STOP, 8)
    told = {"tokens_evaluated": 40, "timings/cache_n": 32}
    completion = student.completion("llama.cpp", {"tokens": [304, 7], "stop_type": "eos", **told}, request())
    assert (completion.token_ids, completion.stop_id, completion.uncached_prompt_tokens) == ([304], 7, 8)
    assert read(student, "llama.cpp", {"tokens": [304, STOP], "stop_type": "word"}) == ([304], STOP)
    assert read(student, "llama.cpp", {"tokens": [304, 305], "stop_type": "word"}) == ([304, 305], None)


@pytest.mark.parametrize("protocol", ["sglang", "llama.cpp"])
@pytest.mark.parametrize("given", [[1], None, {}, {"output_ids": "a", "tokens": 7, "meta_info": []}])
def test_a_native_answer_without_ids_is_refused(student, protocol, given):
    with pytest.raises(AnswerError, match="without tokens of this vocabulary"):
        student.completion(protocol, given, request())


# --- streams


@pytest.mark.parametrize("repeats", [True, False], ids=["all ids so far", "new ids"])
def test_events_of_sglang_bring_each_id_once(student, repeats):
    ids, ends = [304, 305, 306, STOP], (1, 3, 4)
    events = [
        sglang(ids[:end] if repeats else ids[begin:end], end) for begin, end in zip((0, 1, 3), ends, strict=True)
    ]
    first = student.piece("sglang", events[:2], request(), 8)
    last = student.piece("sglang", events[2:], request(), 5)
    assert (first.token_ids, last.token_ids, last.stop_id) == ([304, 305, 306], [], STOP)
    assert student.piece("sglang", [sglang(ids if repeats else [], 4)], request(), 4) is None


def test_events_that_arrive_together_are_one_piece(student):
    events = [answer(token_ids=[304], finish_reason=None), {"choices": []}, answer(token_ids=[305, STOP, 306])]
    piece = student.piece(IDS, events, request(), 8)
    assert (list(piece.token_ids), piece.stop_id) == ([304, 305], STOP)
    assert student.piece(IDS, [{"choices": []}, answer(token_ids=[], finish_reason="stop")], request(), 8) is None
    with pytest.raises(AnswerError, match="sent 2 tokens, 1 were asked for"):
        student.piece(IDS, [answer(token_ids=[304, 305])], request(), 1)


# --- what the server says

LIMIT = "Rate limit exceeded: free-models-per-day"
ERRORS = {
    "of OpenAI's kind": ({"error": {"message": LIMIT, "type": "x", "code": "rate_limit_exceeded"}}, None),
    "of OpenRouter's": ({"error": {"message": LIMIT, "code": 429}, "user_id": "u"}, 429),
    "beside choices": ({"error": {"message": LIMIT, "code": 502}, "choices": [{"finish_reason": "error"}]}, 502),
    "with its status": ({"error": {"message": LIMIT, "status": 503}}, 503),
    "a code as text": ({"error": {"message": LIMIT, "code": "429"}}, 429),
    "a plain text": ({"error": LIMIT, "error_type": "overloaded"}, None),
    "of vLLM's former kind": ({"object": "error", "message": LIMIT, "type": "BadRequestError", "code": 400}, 400),
    "a code of another kind": ({"error": {"message": LIMIT, "code": 1302}}, None),
    "without a message": ({"error": {"reason": LIMIT}}, None),
}


@pytest.mark.parametrize(("given", "status"), ERRORS.values(), ids=ERRORS)
def test_an_error_object_under_status_200_is_an_error_with_its_words(given, status):
    with pytest.raises(AnswerError, match=LIMIT) as caught:
        api.parse(json.dumps(given).encode())
    assert caught.value.status == status and LIMIT in caught.value.words
    assert LIMIT in api.server_words(json.dumps(given).encode())


def test_an_error_inside_a_choice_is_found_too(student):
    with pytest.raises(AnswerError, match="no instance") as caught:
        student.completion(TEXT, answer(text="", error={"code": 502, "message": "no instance"}), request())
    assert caught.value.status == 502


def test_an_empty_error_is_none():
    assert api.parse(b'{"error": null, "choices": []}') == {"error": None, "choices": []}


@pytest.mark.parametrize("text", ["<html>busy</html>", '{"choices": [{"token_ids": [1, 2', "", "[" * 100_000])
def test_what_is_not_json_is_shown(text):
    with pytest.raises(AnswerError, match="not JSON") as caught:
        api.parse(text.encode())
    assert text[:10] in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"message": "no such route"}', "no such route"),
        ('{"detail": [{"loc": 1}]}', '{"detail": [{"loc": 1}]}'),
        ("<html>\n <h1>502 Bad Gateway</h1>\n</html>", "<html> <h1>502 Bad Gateway</h1> </html>"),
        ("[1]", "[1]"),
        ("", ""),
    ],
)
def test_the_words_of_an_error_body_are_its_message_or_its_beginning(text, words):
    assert api.server_words(text.encode()) == words


# --- what servers tell of themselves


def usage(tokens, cached):
    return {"prompt_tokens": tokens, "prompt_tokens_details": {"cached_tokens": cached}}


@pytest.mark.parametrize(
    ("told", "uncached"),
    [
        (usage(40, 32), 8),
        (usage(40, 0), 40),
        (usage(40, 41), None),
        (usage(40, -1), None),
        (usage(40, "32"), None),
        (usage(40.0, 32), None),
        (usage(True, True), None),
        ({"prompt_tokens": 40}, None),
        ({"prompt_tokens": 40, "prompt_tokens_details": None}, None),
        ({"prompt_tokens_details": {"cached_tokens": 32}}, None),
        ([40, 32], None),
        (None, None),
    ],
)
def test_tokens_that_were_not_in_the_cache_are_known_where_the_server_tells(told, uncached):
    assert api.uncached_tokens({"choices": [], "usage": told}) == uncached
    assert api.uncached_tokens([told]) is None


def test_served_models_and_their_context():
    assert api.served({"data": [{"id": "a", "max_model_len": 9}, {"id": "b"}, "c", {"max_model_len": 1}]}) == {
        "a": 9, "b": None, "None": 1
    }  # fmt: skip
    llama_cpp = {"id": "c", "meta": {"n_ctx": 2048, "n_ctx_train": 8192}}
    assert api.served({"data": [llama_cpp]}) == {"c": 2048}
    for odd in ("9", 9.0, True, -1, 0, None):
        assert api.served({"data": [{"id": "a", "max_model_len": odd}]}) == {"a": None}
    assert api.served({"data": "a"}) == api.served([]) == api.served(None) == {}


def test_the_size_of_a_cache_is_read_from_vllms_metrics():
    line = 'vllm:cache_config_info{block_size="16",enable_prefix_caching="True",num_gpu_blocks="100"} 1.0'
    assert api.cache_tokens(f"# HELP\nother 1\n{line}\n") == 1600
    assert api.cache_tokens("other 1\n") is None and api.cache_tokens(line.replace('"100"', '"None"')) is None


def test_tokens_of_the_same_text_are_compared(student):
    text = json.loads(student.tokenize_body())["prompt"]
    right = VOCABULARY.encode_template(text)
    assert student.other_tokens({"tokens": right}) is None
    assert student.other_tokens({"tokens": []}) is None and student.other_tokens({"ids": right}) is None
    wrong = [*right[:7], 1, *right[8:]]
    assert "at token 7" in student.other_tokens({"tokens": wrong})
    assert "<think>" in text, "the markers of the chat template are compared too"

from tests.test_transform import prompts, rows_of, scripted


def test_rows_that_were_there_before_count_as_rows_but_not_into_rates(tmp_path):
    journal = str(tmp_path / "rows.journal")
    rows_of(prompts(3), scripted(journal=journal))
    with scripted(journal=journal) as transform:
        given = prompts(5)
        given.map(transform, batched=True, features=transform.features(given), load_from_cache_file=False)
        told = transform.summary()
    assert (told.finished, told.found, told.failed) == (5, 3, 0)
    assert told.tokens["student"] > told.written_tokens["student"] > 0 == told.written_tokens["teacher"]

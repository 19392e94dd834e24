"""A dataset of the hub, which tests cannot reach: what is said then."""

import pytest

from qst_tune.data import auto_dataset
from qst_tune.data.rows.local_files import HubRows
from qst_tune.errors import UserError


def test_unreachable_hub_is_one_line_that_names_local_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        auto_dataset(None, source="somebody/absent-dataset")
    message = str(error.value)
    assert message.startswith("source=somebody/absent-dataset cannot be read from the hub (")
    assert "dataset.data_files=my.jsonl" in message
    assert len(message.splitlines()) == 1


def test_place_names_the_source() -> None:
    rows = HubRows([{"text": "a"}], "somebody/texts, split train")
    assert rows.place(0) == "row 0 of somebody/texts, split train"
    assert rows[0] == {"text": "a"}

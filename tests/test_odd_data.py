"""Data that is odd but not bad is read: any text and line end, repeated ids, a placeholder within a question."""

import pytest
from input_files import array, instruct, lines, pair

from minialign.data import Record, instruct_record, number_repeats, read_instruct, read_pairs


@pytest.mark.parametrize("read,write,make", [(read_instruct, array, instruct), (read_pairs, lines, pair)])
def test_what_is_not_bad(tmp_path, read, write, make):
    """A byte order mark, Windows line ends, no line end at all, and whatever text may hold."""
    odd = "  <image> </s> \u2028 \x85 Zürich 東京 \x00 \u200b "
    records = [make(0), make(1), make(2, id=odd)]
    path = tmp_path / "data"
    path.write_bytes(write(*records))
    good = read(str(path), None)
    assert len(good) == 3 and good[2].id == odd
    for data in (b"\xef\xbb\xbf" + write(*records), write(*records).replace(b"\n", b"\r\n"), write(*records).rstrip()):
        path.write_bytes(data)
        assert read(str(path), None) == good
    assert read(str(path), 2) == good[:2]


def test_repeated_ids_are_numbered(tmp_path):
    """LLaVA-Instruct's ids are the pictures': records share them, and each has its own seed and place."""
    path = tmp_path / "data.json"
    path.write_bytes(array(*(instruct(i, id=name) for i, name in enumerate([7, "7", "7#2", "8", "7"]))))
    assert [record.id for record in read_instruct(str(path), None)] == ["7", "7#2", "7#2#2", "8", "7#3"]
    many = number_repeats([Record("x", "", [], "")] * 20_000)  # no quadratic search
    assert len({record.id for record in many}) == 20_000


def test_only_the_placeholder_is_taken_out_of_a_question():
    talk = [{"from": "human", "value": "<image>\nWhat does <image> mean?"}, {"from": "gpt", "value": "A picture."}]
    record = instruct_record({"id": "1", "image": "a.png", "conversations": talk})
    assert record.turns == [("user", "What does <image> mean?")]

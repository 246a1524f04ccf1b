"""Data that is odd but not bad is read: any text and line end, repeated ids."""

import pytest
from input_files import array, instruct, lines, pair, pairs_in, records_in

from minialign.data.record_files import number_repeats
from minialign.data.records import Record


@pytest.mark.parametrize("write", [array, lines])
@pytest.mark.parametrize("read,make", [(records_in, instruct), (pairs_in, pair)])
def test_what_is_not_bad(tmp_path, read, write, make):
    """A byte order mark, Windows line ends, no line end at all, and whatever text may hold."""
    odd = "  <image> </s> \u2028 \x85 Zürich 東京 \x00 \u200b "
    records = [make(0), make(1), make(2, id=odd)]
    path = tmp_path / "data"
    path.write_bytes(write(*records))
    good = read(path)
    assert len(good) == 3 and good[2].id == odd
    for data in (
        b"\xef\xbb\xbf" + write(*records),
        write(*records).replace(b"\n", b"\r\n"),
        write(*records).rstrip(),
    ):
        path.write_bytes(data)
        assert read(path) == good
    assert [record for record in good if record in read(path, 2)] == read(path, 2) and len(
        read(path, 2)
    ) == 2


def test_repeated_ids_are_numbered(tmp_path):
    """LLaVA-Instruct's ids are the pictures': records share them, and each has its own seed and
    place.
    """
    path = tmp_path / "data.json"
    path.write_bytes(
        array(*(instruct(i, id=name) for i, name in enumerate([7, "7", "7#2", "8", "7"])))
    )
    records = records_in(path)
    assert (
        len({record.id for record in records}) == 5
        and records[3].id == "8"
        and "7" in {r.id for r in records}
    )
    assert [record.image for record in records] == [instruct(i)["image"] for i in range(5)]
    for limit in range(1, 5):  # a larger subset holds the smaller ones, under the same ids
        assert [record for record in records if record in records_in(path, limit)] == records_in(
            path, limit
        )
    many = number_repeats([Record("x", "", [], "")] * 20_000)  # no quadratic search
    assert len({record.id for record in many}) == 20_000

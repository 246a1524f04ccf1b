"""--skip-bad-records leaves bad records out, counts them, and changes nothing for the good ones."""

import json

from input_files import array, gives_remedy, instruct, left_in, lines, pair, sample, train


def test_bad_records_are_skipped_and_counted(model, tmp_path, pictures, capsys):
    good = [instruct(i, image="good.png") for i in range(3)]
    bad = [
        instruct(9, image="text.png"),
        instruct(8, image=7),
        5,
        instruct(7, image="../outside.png"),
    ]
    (tmp_path / "good.json").write_bytes(array(*good))
    (tmp_path / "mixed.json").write_bytes(
        array(bad[0], good[0], bad[1], bad[2], good[1], good[2], bad[3])
    )
    flags = ["--images", str(pictures), "--batch-size", "2"]
    sample(model, tmp_path / "a", "--data", str(tmp_path / "good.json"), *flags)
    sample(
        model, tmp_path / "b", "--data", str(tmp_path / "mixed.json"), *flags, "--skip-bad-records"
    )
    assert (tmp_path / "a" / "pairs.jsonl").read_bytes() == (
        tmp_path / "b" / "pairs.jsonl"
    ).read_bytes()
    assert json.loads((tmp_path / "b" / "pairs.jsonl.stats.json").read_text())["left_out"] == 2
    shown = capsys.readouterr()
    assert "2 bad records skipped, the first:" in shown.out + shown.err
    (tmp_path / "all.json").write_bytes(array(*bad[1:3]))
    run = ["--data", str(tmp_path / "all.json"), "--skip-bad-records"]
    gives_remedy(lambda: sample(model, tmp_path / "c", *run), "no usable record")
    assert left_in(tmp_path / "c") == []


def test_bad_pairs_are_skipped_and_counted(model, tmp_path, pictures, capsys):
    good = [pair(i, images=["good.png"]) for i in range(3)]
    long = pair(5, images=["good.png"], chosen="A cup. " * 300)
    bad = [pair(4, images=["text.png"]), "{", long, pair(6, prompt=None)]
    (tmp_path / "good.jsonl").write_bytes(lines(*good))
    (tmp_path / "mixed.jsonl").write_bytes(
        lines(bad[0], good[0], bad[1], bad[2], good[1], bad[3], good[2])
    )
    for name in ("good", "mixed"):
        run = [
            "--pairs",
            str(tmp_path / f"{name}.jsonl"),
            "--images",
            str(pictures),
            "--skip-bad-records",
        ]
        train(model, tmp_path / name, *run)
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "good" / adapter).read_bytes() == (tmp_path / "mixed" / adapter).read_bytes()
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("4 bad records skipped, the first:") == 1
    (tmp_path / "all.jsonl").write_bytes(lines(bad[0], bad[2]))
    run = ["--pairs", str(tmp_path / "all.jsonl"), "--images", str(pictures), "--skip-bad-records"]
    gives_remedy(lambda: train(model, tmp_path / "all", *run), "no usable record")
    assert left_in(tmp_path / "all") == []

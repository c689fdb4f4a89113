"""Runs side by side: progress, table, picture."""

import json

import pytest

from d2distill.classification.compare import Entry, draw_curves, run_all, table
from d2distill.common.errors import UserError


def write_run(folder, top1, best):
    folder.mkdir(parents=True)
    facts = {"top1": top1, "best_top1": best, "parameters": 1234567, "flops": 2.5e6, "seconds": 12.4}
    (folder / "results.json").write_text(json.dumps(facts))
    lines = [{"iteration": i, "epoch": i + 1, "top1": top1 * (i + 1) / 3} for i in range(3)] + [
        {"iteration": 3, "lr": 1}
    ]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))


def test_table_and_picture(tmp_path):
    entry, single = Entry("with KD", "configs/kd.yaml", [0, 1, 2]), Entry("teacher", "configs/t.yaml", [0])
    for folder, top1 in zip(entry.folders(tmp_path), (90, 92, 97), strict=True):
        write_run(folder, top1, top1 + 1)
    write_run(single.folders(tmp_path)[0], 99, 99)
    rows = table([entry, single], tmp_path).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    assert cells[0] == ["with KD", "93.00 ± 3.61", "94.00 ± 3.61", "1.235 M", "2.5 M", "12 s", "3"]
    assert cells[1][:3] == ["teacher", "99.00", "99.00"]
    draw_curves([entry, single], tmp_path, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_runs_go_on_where_they_stopped_and_failures_are_shown(tmp_path, capfd):
    (tmp_path / "small.yaml").write_text(
        "MODEL: {STUDENT: {NAME: resnet8}, DEVICE: cpu}\nDATASETS: {NAME: digits, TRAIN_SIZE: 16}\n"
        "SOLVER: {EPOCHS: 1}\nDATALOADER: {NUM_WORKERS: 0}\n"
    )
    entry = Entry("small", str(tmp_path / "small.yaml"), [0, 1])
    run_all([entry], tmp_path / "out", processes=2)
    results = [folder / "results.json" for folder in entry.folders(tmp_path / "out")]
    assert all(path.exists() for path in results)
    before = [json.loads(path.read_text()) for path in results]
    run_all([entry], tmp_path / "out", processes=2)
    assert [json.loads(path.read_text()) for path in results] == before
    assert "2/2 runs, 2/2 steps (100 %)" in capfd.readouterr().err
    broken = Entry("broken", str(tmp_path / "small.yaml"), [2], ["MODEL.STUDENT.WEIGHTS", "missing.pth"])
    with pytest.raises(UserError, match=r"failed:(.|\n)*there is no checkpoint at .*missing.pth"):
        run_all([broken], tmp_path / "out", processes=1)

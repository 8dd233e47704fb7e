"""Metrics: files that survive kills and resuming, and the progress line."""

import errno
import io
import json
import sys

import numpy as np
import PIL.Image
import pytest

from vl2jax.training import metrics_log as metrics
from vl2jax.training.metrics_file import read_metrics
from vl2jax.training.metrics_log import MetricsLog, Throughput


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A fake clock: tests change `clock[0]`."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_lines_as_written(tmp_path):
    with MetricsLog(tmp_path / "run", total_steps=2, stream=io.StringIO()) as log:
        log.write(1, {"train/loss": np.float32(1.1), "moe/max_violation": np.array([0.5, np.nan])})
        assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1  # at once
        log.write(2, {"train/loss": float("inf"), "train/aux_loss": 0})
        log.write(3, {"train/loss": 5.0}, keep=False)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert text.splitlines() == [
        '{"step": 1, "train/loss": 1.1, "moe/max_violation": [0.5, null]}',
        '{"step": 2, "train/loss": null, "train/aux_loss": 0.0}',
    ]
    with PIL.Image.open(tmp_path / "run" / "curves.png") as image:
        assert image.format == "PNG" and image.size == (1680, 570)


def test_events_have_a_tag_per_layer(tmp_path):
    with MetricsLog(tmp_path, total_steps=1, stream=io.StringIO()) as log:
        log.write(1, {"moe/entropy": [1.0, 2.0, float("nan")], "train/loss": 3.0})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    data = path.read_bytes()
    assert b"moe/entropy/0" in data and b"moe/entropy/1" in data and b"train/loss" in data
    assert b"moe/entropy/2" not in data


def test_resuming_reads_as_one_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(tmp_path, total_steps=6, stream=io.StringIO()) as log:
        for step in range(1, 5):
            log.write(step, {"train/loss": 10.0 - step})
            if step % 2 == 0:
                log.write(step, {"heldout/loss": 9.0})
    with open(path, "a") as file:
        file.write('{"step": 5, "train/lo')  # killed
    stream = io.StringIO()
    with MetricsLog(tmp_path, total_steps=6, start_step=2, stream=stream) as log:
        for step in range(3, 7):
            log.write(step, {"train/loss": 10.0 - step})
    assert [(line["step"], line.get("train/loss")) for line in read_metrics(path)] == [
        *((1, 9.0), (2, 8.0), (2, None), (3, 7.0), (4, 6.0), (5, 5.0), (6, 4.0))
    ]
    assert stream.getvalue().startswith(f"{path}: steps after 2, up to 4, are removed\n")
    assert len(list(tmp_path.glob("events.*"))) == 2


def test_plain_lines(tmp_path, clock):
    stream = io.StringIO()
    log = MetricsLog(tmp_path, total_steps=100, stream=stream, every_seconds=10)
    perf = {"train/token_acc": 0.567, "perf/tokens_per_sec": 12_345.0}
    clock[0] += 60  # compiling
    log.write(1, {"train/loss": 1.23449} | perf)
    for step in range(2, 14):
        clock[0] += 2
        log.write(step, {"train/loss": 1.0} | perf)
    log.note("saved step 13")
    log.write(13, {"heldout/loss": 1.5, "heldout/token_acc": 0.5})
    clock[0] += 2
    log.write(100, {"train/loss": float("nan")})
    log.close()
    log.close()
    assert stream.getvalue().splitlines() == [
        "training   1% 1 of 100 steps, loss 1.234, acc 56.7%, 12.3k tok/s, ? left",
        "training   6% 6 of 100 steps, loss 1, acc 56.7%, 12.3k tok/s, 3:08 left",
        "training  11% 11 of 100 steps, loss 1, acc 56.7%, 12.3k tok/s, 2:58 left",
        "saved step 13",
        "step 13: held-out loss 1.5, acc 50.0%",
        "training 100% 100 of 100 steps, loss nan, acc 56.7%, 12.3k tok/s, 1:26",
    ]


def test_terminal_rewrites_one_line(tmp_path, clock):
    stream = Terminal()
    log = MetricsLog(tmp_path, total_steps=4, stream=stream)
    log.write(1, {"train/loss": 2.0})
    clock[0] += 0.01
    log.write(2, {"train/loss": 1.5})  # too soon to be shown
    clock[0] += 1
    log.write(3, {"train/loss": 1.0})
    log.note("saved step 3")
    log.close()
    last = "training  75% [##################......] 3 of 4 steps, loss 1"
    assert stream.getvalue() == (
        "\rtraining  25% [######..................] 1 of 4 steps, loss 2, ? left\x1b[K"
        f"\r{last}, 0:01 left\x1b[K"
        f"\rsaved step 3\x1b[K\n\r{last}, 0:01 left\x1b[K\n"
    )


def test_resumed_run_counts_its_own_steps(tmp_path, clock):
    stream = io.StringIO()
    log = MetricsLog(tmp_path, total_steps=1000, start_step=900, stream=stream, every_seconds=0)
    for step in (901, 902, 903):
        clock[0] += 1
        log.write(step, {"train/loss": 1.0})
    assert (
        stream.getvalue().splitlines()[-1] == "training  90% 903 of 1000 steps, loss 1, 1:37 left"
    )
    log.close()


def test_full_disk_is_reported_once_and_training_goes_on(tmp_path, monkeypatch):
    stream, real = io.StringIO(), metrics.append_whole
    log = MetricsLog(tmp_path, total_steps=9, stream=stream, every_seconds=1e9)

    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    log.write(1, {"train/lr": 1.0})
    monkeypatch.setattr(metrics, "append_whole", full)
    log.write(2, {"train/lr": 1.0})
    log.write(3, {"train/lr": 1.0})
    monkeypatch.setattr(metrics, "append_whole", real)
    log.write(4, {"train/lr": 1.0})
    log.close()
    said = [line for line in stream.getvalue().splitlines() if "lost" in line]
    assert len(said) == 1 and said[0].startswith("metrics of step 2 are lost, training continues")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 4]


def test_without_matplotlib_the_run_ends_well(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    stream = io.StringIO()
    with MetricsLog(tmp_path, total_steps=1, stream=stream) as log:
        log.write(1, {"train/loss": 1.0})
    (said,) = [line for line in stream.getvalue().splitlines() if "curves" in line]
    assert said.startswith("curves.png was not drawn: plots need matplotlib;")
    assert 'pip install "vl2jax[plots]"' in said
    assert not (tmp_path / "curves.png").exists()


def test_throughput(clock):
    speed = Throughput(4, "NVIDIA H100 80GB HBM3", "bfloat16")
    clock[0] += 2
    assert speed.step(8192, 16, 989e12 * 4, 0.5) == pytest.approx(
        {
            "perf/step_time": 2.0,
            "perf/tokens_per_sec": 4096.0,
            "perf/images_per_sec": 8.0,
            "perf/data_wait": 0.5,
            "perf/tflops_per_device": 494.5,
            "perf/mfu": 0.5,
        }
    )
    clock[0] += 30  # an evaluation
    speed.restart()
    clock[0] += 1
    assert speed.step(100, 0)["perf/step_time"] == 1.0
    assert set(Throughput(1, "cpu", "bfloat16").step(1, 1, 1e9)) >= {"perf/tflops_per_device"}
    assert "perf/mfu" not in Throughput(1, "cpu", "bfloat16").step(1, 1, 1e9)


def test_metrics_are_json_of_numbers(tmp_path):
    with MetricsLog(tmp_path, total_steps=1, stream=io.StringIO()) as log:
        log.write(1, {"train/loss": np.float32(0.5), "moe/dead_experts": np.arange(2)})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "train/loss": 0.5, "moe/dead_experts": [0.0, 1.0]}


def test_numbers_have_the_digits_of_float32(tmp_path):
    values = [1.1, 1 / 3, 3e-30, 16_777_217.0, 1e300, 0.0]
    with MetricsLog(tmp_path, total_steps=1, stream=io.StringIO()) as log:
        log.write(1, {"a": values, "b": np.float32(values[:4])})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"a": [1.1, 0.33333334, 3e-30, 16777216.0, 1e+300, 0.0]' in text
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(np.float32(line["b"]), np.float32(values[:4]))

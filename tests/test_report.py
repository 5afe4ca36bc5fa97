"""The report: read back with a parser that is not ours, and opened in a real browser."""

import base64
import hashlib
import html
import itertools
import json
import math
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eclosion.errors import ConfigError, EnvironmentProblem
from eclosion.report import write_report
from eclosion.report.curves import MAX_POINTS, Series, linear_axis, log_axis, running_mean, short, thin
from eclosion.report.grids import MAX_GRIDS, choose
from eclosion.rundir import RunDir

VOID = {"img", "input", "link", "meta"}
ENVIRONMENT = {
    "device": "Some CPU",
    "num_threads": 2,
    "python": "3.11.7",
    "packages": {"eclosion": "0.1.0", "torch": "2.15.0"},
    "precision": "bf16",
    "world_size": 1,
}
CONFIG = {
    "output": "runs/wings",
    "data": {"source": {"name": "butterflies", "size": 256}, "image_size": 32},
    "task": {"name": "unconditional"},
    "train": {"duration": "200 steps", "batch_size": 8, "micro_batch_size": None},
    "optimizer": {"betas": [0.9, 0.999]},
    "track": {"every": "10 steps", "log": [{"name": "console"}]},
}


# --- a run folder, and a page read back ----------------------------------------------------------------------------


class Page(HTMLParser):
    """Elements and text of a page; fails where a tag is not closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.html = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[int, list[str]] = {}
        self._open: list[int] = []
        self.feed(self.html)
        self.close()
        assert not self._open, [self.elements[i] for i in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for i in self._open:
            self.inside.setdefault(i, []).append(data)

    def texts(self, tag: str, class_: str | None = None) -> list[str]:
        """Text of every such element."""
        return [" ".join("".join(self.inside.get(i, [])).split()) for i in self._found(tag, class_)]

    def attributes(self, tag: str, class_: str | None = None) -> list[dict[str, str | None]]:
        return [self.elements[i][1] for i in self._found(tag, class_)]

    def _found(self, tag: str, class_: str | None) -> list[int]:
        return [
            i
            for i, (name, attributes) in enumerate(self.elements)
            if name == tag and (class_ is None or class_ in (attributes.get("class") or "").split())
        ]

    @property
    def text(self) -> str:
        """Everything a reader sees in the body."""
        return " ".join(self.texts("header") + self.texts("main") + self.texts("footer"))

    def points(self, title: str, kind: str = "linear") -> list[list[object]]:
        """What the readout of a curve can show."""
        for plot in self.attributes("svg", kind):
            if (plot["aria-label"] or "").startswith(f"{title} by step"):
                return json.loads(plot["data-points"] or "")  # type: ignore[no-any-return]
        raise AssertionError(f"no curve {title!r}")


def lines(path: Path, records: object) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))  # type: ignore[attr-defined]


def png(path: Path, shade: int = 128, size: int = 32) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (shade, 90, 60)).save(path)


def numbers(step: int, loss: float = 0.5) -> dict[str, float]:
    return {
        "step": step,
        "samples_seen": 8 * step,
        "train/loss": loss,
        "train/grad_norm": 1.25,
        "train/lr": 1e-4,
        "perf/images_per_second": 100.0,
        "perf/data_wait": 0.01,
        "sys/memory_gb": 1.5,
    }


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of 200 steps that was resumed once and has ended."""
    folder = RunDir(tmp_path / "wings")
    folder.root.mkdir()
    folder.config.write_text(json.dumps(CONFIG))
    noise = random.Random(0)
    lines(folder.metrics, (numbers(s, math.exp(-s / 60) + noise.uniform(0.1, 0.2)) for s in range(2, 201, 2)))
    skipped = [{"position": 300, "name": "wings/red.jpg", "reason": "truncated"}]
    lines(
        folder.ledger,
        [
            {"epoch": 0, "index_count": 256, "delivered": 256, "skipped": {}, "samples": []},
            {"epoch": 1, "index_count": 256, "delivered": 255, "skipped": {"truncated": 1}, "samples": skipped},
        ],
    )
    lines(
        folder.events,
        [
            {"event": "training from scratch, 100 steps", "environment": ENVIRONMENT},
            {"event": "accepted change train.duration: '100 steps' -> '200 steps'"},
            {"event": "resuming at step 100 of 200, from wings", "environment": ENVIRONMENT | {"num_threads": 7}},
            {"event": "finished", "step": 200},
        ],
    )
    for step in (0, 100, 200):
        png(folder.sample_grid(step), shade=step)
    for step in (100, 200):
        folder.checkpoint(step).mkdir(parents=True)
        manifest = {"step": step, "files": {"unet.safetensors": {"size": 4_200_000}, "state.json": {"size": 300_000}}}
        (folder.checkpoint(step) / "manifest.json").write_text(json.dumps(manifest))
    return folder


# --- what it says --------------------------------------------------------------------------------------------------


def test_a_finished_run_is_told_with_its_name_state_and_first_numbers(run: RunDir) -> None:
    path = write_report(run.root)
    page = Page(path)
    assert path == run.report
    assert page.texts("title") == ["wings · finished at step 200 · eclosion"]
    assert page.texts("h1") == ["wings"]
    assert page.texts("span", "badge") == ["finished"]
    assert page.texts("dd")[:2] == ["1,600", "6.2"]  # images; 1600 / 256 epochs


def test_a_run_under_way_says_how_far_it_is(run: RunDir) -> None:
    lines(run.events, [{"event": "training from scratch, 200 steps"}])
    run.config.write_text(json.dumps(CONFIG | {"train": {"duration": "32 epochs", "batch_size": 8}}))
    page = Page(write_report(run.root))
    assert page.texts("title") == ["wings · step 200 of 1,024 · eclosion"]  # 32 * 256 / 8
    assert page.texts("span", "badge") == ["not finished"]
    assert float(page.attributes("progress")[0]["value"] or "") == pytest.approx(200 / 1024, abs=1e-4)


def test_a_duration_in_epochs_stands_as_given_while_nothing_says_how_long_an_epoch_is(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.config.write_text(json.dumps(CONFIG | {"train": {"duration": "32 epochs", "batch_size": 8}}))
    page = Page(write_report(folder.root))
    assert "step 0 of 32 epochs" in page.text
    assert not page.attributes("progress")


def test_every_metric_has_a_curve_known_ones_first_and_counters_none(run: RunDir) -> None:
    lines(run.metrics, [numbers(s) | {"eval/fid": 30.0, "another": 1} for s in (10, 20)])
    titles = Page(write_report(run.root)).texts("h3")
    assert titles == [
        "Samples",
        "Loss",
        "Gradient norm",
        "Learning rate",
        "Images per second",
        "Share of time waiting for data",
        "Memory, GiB",
        "another",
        "eval/fid",
    ]


def test_each_network_of_a_cascade_has_its_curves(run: RunDir) -> None:
    lines(run.metrics, [{"step": s, "train/loss/unet_0": 0.2, "train/loss/unet_1": 0.3} for s in (1, 2)])
    assert Page(write_report(run.root)).texts("h3") == ["Samples", "Loss, unet_0", "Loss, unet_1"]


def test_the_loss_has_a_faint_raw_line_a_strong_mean_and_a_logarithmic_twin(run: RunDir) -> None:
    page = Page(write_report(run.root))
    assert len(page.attributes("svg", "log")) == 1
    raw = page.attributes("path", "raw")[0]["d"] or ""
    assert raw.count("L") == 99  # 100 values, one line
    assert page.attributes("path", "mean")[0]["d"] != raw
    pairs = zip(page.points("Loss"), page.points("Loss", "log"), strict=True)
    heights = [(float(str(a[1])), float(str(b[1]))) for a, b in pairs]
    assert [linear for linear, _ in heights] != [log for _, log in heights]
    ordered = [log for _, log in sorted(heights)]
    assert ordered == sorted(ordered)


def test_a_loss_that_is_not_positive_everywhere_has_no_logarithmic_scale(run: RunDir) -> None:
    lines(run.metrics, [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.0}])
    assert not Page(write_report(run.root)).attributes("svg", "log")


def test_skipped_samples_are_counted_by_reason_and_named(run: RunDir) -> None:
    page = Page(write_report(run.root))
    assert "2 finished epochs: 511 images delivered, 1 skipped." in page.text
    assert page.texts("summary") == ["truncated 1"]
    assert page.texts("details") == ["truncated 1wings/red.jpg truncated"]


def test_environment_events_checkpoints_and_config_are_listed(run: RunDir) -> None:
    page = Page(write_report(run.root))
    environment = page.texts("dl", "pairs")[0]
    assert "num threads7" in environment  # of the last start, not the first
    assert "torch2.15.0" in environment
    assert page.texts("li")[-4:] == [
        "training from scratch, 100 steps",
        "accepted change train.duration: '100 steps' -> '200 steps'",
        "resuming at step 100 of 200, from wings",
        "finished step 200",
    ]
    assert "2004.5 MBstep-00000200" in "".join(page.texts("tr"))
    config = " ".join(page.texts("table"))
    for expected in (
        "data.source.namebutterflies",
        "train.micro_batch_sizenull",
        "optimizer.betas[0.9, 0.999]",
        "track.log.0.nameconsole",
    ):
        assert expected in config


# --- pictures ------------------------------------------------------------------------------------------------------


def test_grids_stand_in_the_page_as_they_are_and_the_last_is_shown(run: RunDir) -> None:
    page = Page(write_report(run.root))
    pictures = page.attributes("img")
    assert [picture["alt"] for picture in pictures] == [
        f"Grid of images sampled after {step} steps" for step in (0, 100, 200)
    ]
    embedded = [base64.b64decode((picture["src"] or "").removeprefix("data:image/png;base64,")) for picture in pictures]
    assert embedded == [run.sample_grid(step).read_bytes() for step in (0, 100, 200)]
    assert [figure["class"] for figure in page.attributes("figure", "frame")] == ["frame", "frame", "frame on"]


@pytest.mark.parametrize("count", [1, 2, 23, 24, 25, 47, 1000])
def test_the_chosen_grids_are_few_even_and_keep_both_ends(count: int) -> None:
    grids = [(step, Path(f"{step}.png")) for step in range(count)]
    chosen = [step for step, _ in choose(grids)]
    assert len(chosen) == min(count, MAX_GRIDS)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
    gaps = {b - a for a, b in itertools.pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert 0 not in gaps


def test_large_grids_are_compressed_so_that_the_page_stays_below_ten_megabytes(run: RunDir) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run.sample_grid(300), compress_level=1)
    for step in range(301, 330):
        shutil.copy(run.sample_grid(300), run.sample_grid(step))
    page = Page(write_report(run.root))
    assert len(page.attributes("img")) == MAX_GRIDS
    assert MAX_GRIDS * run.sample_grid(300).stat().st_size > 14e6  # what they would have taken
    assert run.report.stat().st_size < 10e6
    assert "9 more grids are in the run folder." in page.texts("p")
    assert "Some are compressed here; the files are exact." in page.texts("p")


def test_a_damaged_grid_is_named_and_the_others_are_shown(run: RunDir) -> None:
    whole = run.sample_grid(100).read_bytes()
    run.sample_grid(110).write_bytes(whole[:60])
    run.sample_grid(120).write_bytes(b"<svg onload=alert(1)>")
    run.sample_grid(130).write_bytes(b"")
    run.sample_grid(140).symlink_to("nowhere.png")
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = whole[:8] + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + whole[33:]
    run.sample_grid(150).write_bytes(bomb)
    run.sample_grid(160).mkdir()
    page = Page(write_report(run.root))
    names = ", ".join(f"step-{step:08d}.png" for step in range(110, 170, 10))
    assert f"Cannot be read: {names}." in page.text
    assert len(page.attributes("img")) == 3


# --- nothing comes from elsewhere, nothing gets out ------------------------------------------------------------------


def test_the_page_loads_nothing_and_its_policy_allows_its_own_style_and_script_only(run: RunDir) -> None:
    page = Page(write_report(run.root))
    for tag, attributes in page.elements:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, attributes[name])
    policy = dict(part.strip().split(" ", 1) for part in (page.attributes("meta")[1]["content"] or "").split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["img-src"] == "data:"
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert "url(" not in page.html
    assert "@import" not in page.html


EVIL = "</script></style><script>alert(1)</script><img src=x onerror=alert(2)>'\"&{{script}}\x00\x1b[31m\u202e\ud800"
SHOWN = (
    "</script></style><script>alert(1)</script><img src=x onerror=alert(2)>'\"&{{script}}\\x00\\x1b[31m\\u202e\\ud800"
)


def test_hostile_text_is_shown_and_never_obeyed(run: RunDir) -> None:
    before = Page(write_report(run.root))
    run.config.write_text(json.dumps(CONFIG | {EVIL: {EVIL: EVIL}, "task": {"name": EVIL}}))
    lines(run.metrics, [numbers(s) | {EVIL: 1.0, f"train/loss/{EVIL}": 1.0} for s in (1, 2)])
    lines(run.events, [{"event": EVIL, EVIL: EVIL, "environment": {"device": EVIL, EVIL: EVIL}}])
    sample = {"name": EVIL, "reason": EVIL}
    lines(run.ledger, [{"epoch": EVIL, "delivered": EVIL, "skipped": {EVIL: 1}, "samples": [sample]}])
    (run.checkpoint(200) / "manifest.json").write_text(
        json.dumps({"files": {EVIL: {"size": EVIL}}, "meta": {"fingerprint": EVIL}})
    )
    page = Page(write_report(run.root))
    for tag in ("script", "style", "img", "link", "meta", "a"):
        assert len(page.attributes(tag)) == len(before.attributes(tag)), tag
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in before.elements}
    assert page.text.count(SHOWN) >= 8
    assert not [c for c in page.html if ord(c) < 32 and c != "\n"]
    assert "\u202e" not in page.html


def test_a_hostile_folder_name_is_only_a_name(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "<b onclick=x>&amp;\x07")
    folder.root.mkdir()
    page = Page(write_report(folder.root))
    assert page.texts("h1") == ["<b onclick=x>&amp;\\x07"]
    assert not page.attributes("b")


# --- what may be missing or broken ---------------------------------------------------------------------------------


def test_an_empty_folder_has_a_page_that_says_so(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert page.texts("span", "badge") == ["not finished"]
    for said in ("No sample grid yet.", "No value yet.", "No epoch is finished yet.", "No checkpoint yet."):
        assert said in page.text


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b"\x00\xff\xfe", b"[]", b"null", b'{"a"', b"[" * 100_000, b"1" * 9999]
)
def test_files_without_sense_are_noted_and_do_not_stop_the_page(run: RunDir, content: bytes) -> None:
    for path in (run.config, run.metrics, run.ledger, run.events, run.checkpoint(100) / "manifest.json"):
        path.write_bytes(content)
    page = Page(write_report(run.root))
    assert len(page.attributes("img")) == 3
    if content.strip():
        assert "metrics.jsonl: 1 line could not be read." in page.text
        assert "wings/config.json: is not a JSON object." in page.text


def test_a_torn_last_line_costs_that_line_only(run: RunDir) -> None:
    whole = Page(write_report(run.root)).points("Loss")
    for path in (run.metrics, run.ledger, run.events):
        path.write_bytes(path.read_bytes() + b'{"step": 202, "samples_s')
    page = Page(write_report(run.root))
    assert page.points("Loss") == whole
    assert page.text.count("1 line could not be read.") == 3


def test_values_that_are_not_finite_break_the_line_and_are_told(run: RunDir) -> None:
    values = [1.0, 0.9, math.nan, 0.8, math.inf, -math.inf, 0.7, None, 0.6]
    lines(
        run.metrics,
        [{"step": s, "train/loss": v} for s, v in enumerate(values, 1)] + [{"step": 10, "train/loss": 10**400}],
    )
    page = Page(write_report(run.root))
    path = page.attributes("path", "mean")[0]["d"] or ""
    assert path.count("M") == 4
    assert path.count("h0") == 3  # values alone between gaps are dots
    assert "5 values are not finite, the first at step 3" in page.text
    drawn = "".join(attributes["d"] or "" for attributes in page.attributes("path"))
    assert not re.search("nan|inf|e", drawn)


def test_a_curve_without_any_finite_value_says_so(run: RunDir) -> None:
    lines(run.metrics, [{"step": 1, "train/loss": math.nan}])
    assert "No finite value yet." in Page(write_report(run.root)).text


def test_a_single_point_is_a_dot(run: RunDir) -> None:
    lines(run.metrics, [{"step": 5, "train/loss": 0.5}])
    page = Page(write_report(run.root))
    assert len(page.attributes("circle", "dot")) == 2  # linear and logarithmic
    assert page.points("Loss")[0][2:] == [5, "0.5"]


def test_thousands_of_lines_become_a_few_hundred_points_with_every_spike(run: RunDir) -> None:
    spikes = {1234, 7777, 12001}
    lines(run.metrics, ({"step": s, "train/loss": 9.25 + s / 1e5 if s in spikes else 0.5} for s in range(1, 20_001)))
    page = Page(write_report(run.root))
    points = page.points("Loss")
    assert len(points) <= MAX_POINTS
    assert (points[0][2], points[-1][2]) == (1, 20_000)
    assert spikes <= {step for _, _, step, _ in points}
    assert run.report.stat().st_size < 500_000


def test_a_page_that_cannot_be_written_is_one_line_and_leaves_nothing_behind(run: RunDir) -> None:
    run.report.mkdir()
    before = sorted(run.root.iterdir())
    with pytest.raises(EnvironmentProblem, match=r"report\.html: cannot be written .*Make room") as caught:
        write_report(run.root)
    assert "\n" not in str(caught.value)
    assert sorted(run.root.iterdir()) == before
    with pytest.raises(ConfigError, match="is no run folder"):
        write_report(run.root / "missing")


WORDS = st.sampled_from(
    """step samples_seen event environment packages files size meta facts num_samples index_count epoch delivered
    skipped samples name reason train duration batch_size data source image_size task device train/loss
    fingerprint results score value interval n n_reference floor made what against extractor evaluate/kid
    validation/loss validation/loss_error validation/loss/band_0 validation best decided_by""".split()  # noqa: SIM905
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["finished", "3 epochs", "0 steps", "9" * 5000 + " steps", 10**400, 2**53, 5e-324, 1e308, [], {}])
)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=6))
OBJECTS = st.dictionaries(WORDS, TREES, max_size=8)


@settings(max_examples=75, deadline=None)
@given(config=OBJECTS, manifest=OBJECTS, records=st.lists(OBJECTS, max_size=4))
def test_whatever_json_the_files_hold_the_page_is_whole(
    tmp_path_factory: pytest.TempPathFactory, config: object, manifest: object, records: list[object]
) -> None:
    folder = RunDir(tmp_path_factory.mktemp("run"))
    folder.checkpoint(1).mkdir(parents=True)
    folder.config.write_text(json.dumps(config))
    (folder.checkpoint(1) / "manifest.json").write_text(json.dumps(manifest))
    (folder.checkpoint(1) / "state.json").write_text(json.dumps({"validation": manifest}))
    folder.results.write_text(json.dumps({"results": [*records, config]}))
    for path in (folder.metrics, folder.ledger, folder.events):
        lines(path, records)
    page = Page(write_report(folder.root))
    assert len(page.texts("h2")) == 7
    assert not re.search("nan|inf", "".join(path["d"] or "" for path in page.attributes("path")))


# --- validation and evaluation -------------------------------------------------------------------------------------

KID = "evaluate/kid/efficientnet_lite0"


def result(step: int, value: float, split: str = "val") -> dict[str, object]:
    return {
        "score": "kid",
        "value": value,
        "interval": [value - 0.01, value + 0.01],
        "better": "lower",
        "n": 1000,
        "n_reference": 300,
        "floor": {"value": 0.002, "error": 0.001, "n": 150},
        "extractor": {"name": "efficientnet_lite0"},
        "made": {"what": "run", "step": step},
        "against": {"split": split},
    }


@pytest.fixture
def scored(run: RunDir) -> RunDir:
    """The same run with validation in three bands, and with KID."""
    bands = {f"validation/loss/band_{band}": 0.9 - 0.2 * band for band in range(3)}
    errors = {"validation/loss_error": 0.05, "validation/loss_error/band_0": 0.2}
    validations = [{"step": s, "validation/loss": 0.6 - s / 1000, **bands, **errors} for s in (0, 100, 200)]
    scores = [{"step": 100, KID: 0.075}, {"step": 200, KID: 0.05}, {"step": 200, f"{KID}/test": 0.07}]
    lines(run.metrics, [*(numbers(s) for s in range(2, 201, 2)), *validations, *scores])
    rows = [result(100, 0.075), result(200, 0.05), result(200, 0.07, "test")]
    run.results.write_text(json.dumps({"results": rows}))
    best = {"validation": {"best": {"step": 100, "value": 0.075}, "decided_by": "kid/efficientnet_lite0 (0a1b)"}}
    (run.checkpoint(200) / "state.json").write_text(json.dumps(best))
    return run


def figures(run: RunDir) -> dict[str, str]:
    """The markup of each figure with a curve, by its title."""
    parts = Page(write_report(run.root)).html.split("<figure")
    return {title[1]: part for part in parts if (title := re.search(r"<h3[^>]*>(.*?)</h3>", part))}


def test_a_score_is_drawn_with_its_interval_and_with_what_real_images_score(scored: RunDir) -> None:
    drawn = figures(scored)["KID, efficientnet_lite0"]
    assert "1,000 images against 300 of val." in drawn
    assert "real images against real images, 0.002 ± 0.001 (n = 150)." in html.unescape(drawn)
    assert "Lower is better. Shaded: 95 % interval." in drawn
    assert "0.05 (0.04 to 0.06)" in html.unescape(drawn)
    assert drawn.count('class="floor"') == 1
    area = re.search(r'class="band" d="(M[^"]*Z)"', drawn)
    assert area is not None
    corners = [tuple(map(float, corner.split())) for corner in re.split("[ML]", area[1].strip("MZ"))]
    assert [x for x, _ in corners] == [500, 1000, 1000, 500]  # there above, and back below
    assert all(above < below for (_, above), (_, below) in itertools.pairwise([corners[1], corners[2]]))
    assert "300 of test" in figures(scored)["KID, efficientnet_lite0/test"]


def test_the_loss_has_its_interval_and_its_bands_stand_together(scored: RunDir) -> None:
    found = figures(scored)
    assert 'class="band"' in found["Validation loss"]
    assert "0.4 (0.302 to 0.498)" in html.unescape(found["Validation loss"])
    bands = found["Loss by noise level"]
    strengths = re.findall(r'class="mean" d="M[^"]+" stroke-opacity="([0-9.]+)"', bands)
    assert strengths == ["0.20", "0.60", "1.00"] * 2  # linear and logarithmic; clean is the strongest, and on top
    assert "clean 0.9, noise 0.5" in bands
    assert not [title for title in found if "band" in title or "error" in title]


def test_the_best_checkpoint_is_what_the_newest_one_says_it_is(scored: RunDir) -> None:
    page = Page(write_report(scored.root))
    assert "best kid/efficientnet_lite0" in page.html
    assert "0.075 at step 100" in page.html


# --- the numbers behind a curve ------------------------------------------------------------------------------------


@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=200), st.integers(4, 40))
@settings(max_examples=100, deadline=None)
def test_thinning_keeps_the_ends_and_both_extremes(values: list[float | None], limit: int) -> None:
    kept = thin(values, limit)
    finite = [i for i, value in enumerate(values) if value is not None]
    assert len(kept) <= limit
    assert kept == sorted(set(kept) & set(finite))
    if finite:
        assert (kept[0], kept[-1]) == (finite[0], finite[-1])
        heights = [values[i] for i in finite]
        assert {min(heights), max(heights)} <= {values[i] for i in kept}  # type: ignore[type-var]
    if len(finite) <= limit:
        assert kept == finite


def test_the_running_mean_agrees_with_a_convolution_and_ends_on_a_mean_of_many() -> None:
    values = np.random.default_rng(0).normal(size=400)
    means = running_mean(values.tolist(), range(400))
    reach = 10  # 400 / 40
    expected = np.convolve(values, np.full(2 * reach + 1, 1 / (2 * reach + 1)), mode="valid")
    np.testing.assert_allclose(means[reach:-reach], expected, rtol=1e-9, atol=1e-12)
    assert means[0] == values[0]
    assert means[-1] == pytest.approx(values[-1 - reach :].mean())


def test_a_spike_does_not_spoil_the_mean_far_from_it() -> None:
    values = [0.1] * 500 + [1e90] + [0.1] * 500
    assert running_mean(values, [10, 990]) == pytest.approx([0.1, 0.1], rel=1e-12)


FINITE = st.floats(-1e100, 1e100).map(lambda v: v if abs(v) > 1e-100 else 0.0)


@given(st.lists(FINITE, min_size=1, max_size=5), st.booleans(), st.booleans())
@settings(max_examples=300)
def test_ticks_of_a_linear_axis_are_few_round_and_on_it(values: list[float], from_zero: bool, tight: bool) -> None:
    axis = linear_axis(values, from_zero=from_zero, tight=tight)
    assert all(0 <= axis.place(value) <= 1 for value in values)
    ticks = [tick for tick, _ in axis.ticks]
    assert 2 <= len(ticks) <= 7
    assert all(-1e-6 <= axis.place(tick) <= 1 + 1e-6 for tick in ticks)
    step = min(b - a for a, b in itertools.pairwise(ticks))
    assert f"{step:.3e}"[:5] in ("1.000", "2.000", "5.000")


@given(st.lists(st.floats(1e-100, 1e100), min_size=1, max_size=5))
@settings(max_examples=300)
def test_ticks_of_a_logarithmic_axis_are_on_it(values: list[float]) -> None:
    axis = log_axis(values)
    assert all(0 < axis.place(value) < 1 for value in values)
    places = [axis.place(tick) for tick, _ in axis.ticks]
    assert 1 <= len(places) <= 14
    assert places == sorted(places)
    assert all(-1e-6 <= place <= 1 + 1e-6 for place in places)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 1.0], ["0", "0.5", "1.0"]),
        ([0.0, 1e-4], ["0", "5e-5", "1e-4"]),
        ([0.0, 10_000.0], ["0", "5k", "10k"]),
        ([0.0, 3e6], ["0", "1M", "2M", "3M"]),
        ([-1.0, 1.0], ["-1.0", "-0.5", "0", "0.5", "1.0"]),
        ([7.0], ["0", "2", "4", "6", "8"]),
        ([0.0], ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
    ],
)
def test_labels_read_well(values: list[float], labels: list[str]) -> None:
    assert [label for _, label in linear_axis(values).ticks] == labels


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"),
        (0.051234, "0.05123"),
        (1234.5, "1,234"),
        (1e-5, "1e-5"),
        (2.5e-5, "2.5e-5"),
        (3.2e9, "3.2e9"),
        (-2.0, "-2"),
    ],
)
def test_values_are_told_in_four_digits(value: float, said: str) -> None:
    assert short(value) == said


def test_a_series_knows_its_finite_values() -> None:
    assert Series("x", [1, 2, 3], [0.5, None, 0.25]).finite == [(1, 0.5), (3, 0.25)]


# --- the page as a page --------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_has_the_contrast_that_wcag_wants_in_light_and_dark(run: RunDir) -> None:
    css = Page(write_report(run.root)).texts("style")[0]
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root \{(.*?)\}", css)
    )
    for colours in (light, dark):
        on_paper = [("ink", "paper"), ("quiet", "paper"), ("quiet", "card"), ("accent", "card"), ("lost", "card")]
        for text, ground in [*on_paper, ("good", "good-paper"), ("open", "open-paper"), ("ink", "rule")]:
            bright, dim = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, ground)


def test_landmarks_headings_and_names_are_there_for_a_screen_reader(run: RunDir) -> None:
    page = Page(write_report(run.root))
    for landmark in ("header", "nav", "main", "footer", "h1"):
        assert len(page.attributes(landmark)) == 1, landmark
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {(link["href"] or "")[1:] for link in page.attributes("a")} <= ids
    assert {section["aria-labelledby"] for section in page.attributes("section")} <= ids
    assert all(picture["alt"] for picture in page.attributes("img"))
    assert all(plot["aria-label"] for plot in page.attributes("svg", "plot"))
    assert all(table for table in page.texts("caption"))
    assert page.attributes("html") == [{"lang": "en"}]


def test_the_report_needs_no_torch() -> None:
    """`eclosion runs` and the like must start at once."""
    code = "import sys, eclosion.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_browser_shows_it_without_a_complaint_or_a_request(run: RunDir) -> None:
    """In a real browser: the slider changes the picture, the keyboard too, and a curve can be read."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(chromium).exists():
        pytest.skip("there is no Chromium here: apt-get install chromium")
    path = write_report(run.root)
    complaints: list[str] = []
    requests: list[str] = []
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        assert page.title() == "wings · finished at step 200 · eclosion"

        shown = page.locator(".frame.on img")
        assert shown.get_attribute("alt") == "Grid of images sampled after 200 steps"
        assert shown.evaluate("image => image.naturalWidth") == 32
        page.get_by_role("slider").fill("0")
        assert shown.get_attribute("alt") == "Grid of images sampled after 0 steps"
        page.get_by_role("slider").press("ArrowRight")
        assert shown.get_attribute("alt") == "Grid of images sampled after 100 steps"
        assert page.locator(".samples output").inner_text() == "step 100"
        assert page.locator(".frame:visible").count() == 1

        plot, told = page.locator("svg.plot.linear").first, page.locator(".results .chart output")
        at_rest = told.inner_text()
        assert re.fullmatch(r"[\d.]+ at step 200", at_rest)
        plot.hover()  # its middle
        assert re.fullmatch(r"[\d.]+, mean [\d.]+ at step 100", told.inner_text())
        page.mouse.move(0, 0)
        assert told.inner_text() == at_rest
        plot.focus()
        page.keyboard.press("Home")
        assert told.inner_text().endswith(" at step 2")

        page.get_by_role("radio", name="log").check()
        assert page.locator("svg.plot.log").is_visible()
        assert not plot.is_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (
            "a phone must not scroll sideways"
        )
        browser.close()
    assert not complaints
    assert {url.partition(":")[0] for url in requests} <= {"file", "data"}

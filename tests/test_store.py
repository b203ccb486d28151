"""The store publishes whole bundles or nothing, once for each key, whatever happens to the process."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flux2_trt.bundle import Bundle, ComponentRecord, content_key, read_manifest
from flux2_trt.draft import Draft
from flux2_trt.errors import BundleError, CheckpointError, Flux2Error, Interrupted, UsageError
from flux2_trt.models import published_spec
from flux2_trt.store import Store, store_root

KEY = content_key({"graph": "abc"})
SPAWN = multiprocessing.get_context("spawn")
HANG_SECONDS = 300  # a guard, not a measurement: a busy machine starts processes slowly
PLAN, WEIGHTS = b"plan" * 1000, b"weights" * 1000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def fill(draft: Draft, plan: bytes = PLAN) -> None:
    plan_path, weights_path = draft.plan_path("transformer", ".onnx"), draft.weights_path("transformer")
    plan_path.write_bytes(plan)
    weights_path.write_bytes(WEIGHTS)
    tokenizer = draft.asset_path("tokenizer.json")
    tokenizer.write_text("{}")
    record = ComponentRecord(
        name="transformer",
        plan=draft.record(plan_path),
        graph_sha256="0" * 64,
        compiler="onnxruntime",
        compiler_version="1.32.0",
        weights=draft.record(weights_path),
        weight_placement="bound",
        shapes={"latents": {"dtype": "float32", "shape": ["batch", "tokens", 32]}},
        layers={},
    )
    draft.finish([record], [draft.record(tokenizer)], source={"checkpoint": "random", "seed": 7})


def publish(store: Store, key: str = KEY, recipe: str = "fp32", target: str = "cpu") -> Bundle:
    with store.publish(key, model=published_spec("tiny"), recipe=recipe, target=target) as draft:
        if not draft.done:
            fill(draft)
    return draft.bundle


def content(store: Store) -> list[str]:
    return sorted(path.name for path in store.bundles.iterdir()) if store.bundles.exists() else []


def other_key(number: int) -> str:
    return content_key({"graph": number})


# publish


def test_publish_makes_the_layout_and_open_reads_it(store):
    bundle = publish(store)
    name = f"tiny-fp32-cpu-{KEY[:12]}"
    assert content(store) == [name] and bundle.path == (store.bundles / name).resolve()
    files = sorted(path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file())
    assert files == [
        "assets/tokenizer.json",
        "bundle.json",
        "plans/transformer.onnx",
        "weights/transformer.fp32.safetensors",
    ]
    opened = Bundle.open(bundle.path)
    assert opened.manifest == bundle.manifest and opened.manifest.key == KEY
    assert opened.plan_path("transformer").read_bytes() == PLAN
    assert opened.manifest.source == {"checkpoint": "random", "seed": 7}


def test_second_publish_finds_the_first(store):
    first = publish(store)
    before = first.plan_path("transformer").stat()
    with store.publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu") as draft:
        assert draft.done and draft.bundle.manifest == first.manifest
    assert first.plan_path("transformer").stat() == before


def test_damaged_bundle_is_replaced_never_mixed(store, caplog):
    first = publish(store)
    (first.path / "weights/transformer.fp32.safetensors").write_bytes(b"x" * len(WEIGHTS))
    (first.path / "leftover").write_text("of the first")
    second = publish(store)
    assert "replacing a damaged bundle" in caplog.text
    second.verify()
    assert not (second.path / "leftover").exists()
    assert content(store) == [second.path.name]


def test_bundle_of_another_key_in_the_place_is_not_reused(store):
    first = publish(store)
    collision = KEY[:12] + "0" * 52
    assert publish(store, collision).manifest.key == collision
    assert content(store) == [first.path.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_exception_in_the_block_leaves_nothing(store, error):
    with pytest.raises(error), store.publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu") as draft:
        fill(draft)
        raise error
    assert content(store) == []
    with pytest.raises(RuntimeError, match="not published"):
        _ = draft.bundle
    publish(store).verify()


def test_ctrl_c_during_the_last_steps_leaves_nothing_or_all(store, monkeypatch):
    for step in range(12):
        calls = 0

        def interrupted(handle, real=os.fsync, step=step):
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise KeyboardInterrupt
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", interrupted)
            try:
                publish(store)
            except KeyboardInterrupt:
                for name in content(store):
                    Bundle.open(store.bundles / name).verify()
        shutil.rmtree(store.root)
    assert calls < 12  # every step was interrupted once


def test_builder_that_does_not_finish_is_an_error(store):
    with (
        pytest.raises(RuntimeError, match="neither finished"),
        store.publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu"),
    ):
        pass
    assert content(store) == []


def test_files_that_the_manifest_does_not_describe_are_refused(store):
    def attempt(spoil):
        with store.publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu") as draft:
            fill(draft)
            spoil(draft)

    with pytest.raises(BundleError, match=r"does not name plans/transformer\.onnx\.data"):
        attempt(lambda draft: (draft.folder / "plans/transformer.onnx.data").write_bytes(b"weights"))
    with pytest.raises(BundleError, match=r"sha256"):
        attempt(lambda draft: draft.plan_path("transformer", ".onnx").write_bytes(b"nalp" * 1000))
    with pytest.raises(BundleError, match=r"no file found"):
        attempt(lambda draft: draft.asset_path("tokenizer.json").unlink())
    assert content(store) == []


def test_umask_of_zero_does_not_make_bundles_that_open_refuses(store):
    before = os.umask(0)
    try:
        bundle = publish(store)
    finally:
        os.umask(before)
    assert not any(path.stat().st_mode & stat.S_IWOTH for path in bundle.path.rglob("*"))
    Bundle.open(bundle.path)


# races and killed processes


def race(root, barrier, results):
    barrier.wait()
    built = False
    with Store(root).publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu") as draft:
        if not draft.done:
            built = True
            time.sleep(0.3)
            fill(draft)
    draft.bundle.verify()
    results.put((built, draft.bundle.manifest.created))


def hang(root, started, journal):
    with Store(root).publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu") as draft:
        fill(draft)
        if journal:
            draft.journal_path("transformer").write_text("the weights")
        started.set()
        time.sleep(HANG_SECONDS)


def test_two_processes_build_one_key_once(store):
    barrier, results = SPAWN.Barrier(2), SPAWN.Queue()
    processes = [SPAWN.Process(target=race, args=(store.root, barrier, results), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    (first, created), (second, other) = results.get(timeout=HANG_SECONDS), results.get(timeout=HANG_SECONDS)
    for process in processes:
        process.join(HANG_SECONDS)
        assert process.exitcode == 0
    assert first != second and created == other
    assert len(content(store)) == 1


def killed(store, journal=False) -> None:
    started = SPAWN.Event()
    process = SPAWN.Process(target=hang, args=(store.root, started, journal), daemon=True)
    process.start()
    assert started.wait(HANG_SECONDS)
    os.kill(process.pid, signal.SIGKILL)
    process.join(HANG_SECONDS)


def test_killed_process_leaves_no_bundle_and_the_next_cleans_up(store):
    killed(store)
    (left,) = content(store)
    assert left.startswith(f".staging-tiny-fp32-cpu-{KEY[:12]}-") and store.list() == []
    (store.bundles / f".removed-{KEY[:12]}-{'0' * 32}").mkdir()
    (store.bundles / f".staging-{other_key(1)[:12]}-{'0' * 32}").mkdir()  # of another key: not ours to touch
    publish(store).verify()
    assert content(store) == [f".staging-{other_key(1)[:12]}-{'0' * 32}", f"tiny-fp32-cpu-{KEY[:12]}"]


def test_weights_with_a_journal_survive_a_kill_and_nothing_else_does(store):
    killed(store, journal=True)
    (left,) = store.unfinished()
    assert (left.name, left.key) == (f"tiny-fp32-cpu-{KEY[:12]}", KEY) and left.bytes > len(WEIGHTS)
    assert store.list() == []
    with store.publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu") as draft:
        assert draft.resumed and draft.journal_path("transformer").read_text() == "the weights"
        files = sorted(path.name for path in draft.folder.rglob("*") if path.is_file())
        assert files == ["transformer.fp32.safetensors"]
        fill(draft)
    draft.bundle.verify()
    assert content(store) == [draft.name] and store.unfinished() == []


def interrupt(store, error: BaseException, key: str = KEY) -> None:
    with (
        pytest.raises(type(error) if not isinstance(error, OSError) else Flux2Error),
        store.publish(key, model=published_spec("tiny"), recipe="fp32", target="cpu") as draft,
    ):
        fill(draft)
        draft.journal_path("transformer").write_text("the weights")
        raise error


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (KeyboardInterrupt(), True),
        (Interrupted("the build was cancelled"), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (CheckpointError("weight holds NaN or infinity"), False),  # the next try would end there, too
    ],
)
def test_weights_with_a_journal_stay_for_another_try_if_it_can_end_otherwise(store, caplog, error, kept):
    interrupt(store, error)
    assert len(content(store)) == kept and (f"bundles remove tiny-fp32-cpu-{KEY[:12]}" in caplog.text) == kept
    with store.publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu") as draft:
        assert draft.resumed == kept
        fill(draft)
    assert content(store) == [draft.name]


def test_weights_of_another_key_are_never_taken(store):
    interrupt(store, KeyboardInterrupt(), KEY[:12] + "0" * 52)
    with store.publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu") as draft:
        assert not draft.resumed and not list(draft.folder.rglob("*"))
        fill(draft)
    assert content(store) == [draft.name]


def test_unfinished_bundles_are_removed_by_name_path_and_key(store):
    place = store.bundles / f"tiny-fp32-cpu-{KEY[:12]}"
    for which in (place.name, place, KEY[:8]):
        interrupt(store, KeyboardInterrupt())
        assert store.remove(which) == place
        assert content(store) == [] and store.unfinished() == []
    with pytest.raises(BundleError, match="no bundle "):
        store.remove(place.name)


def test_staging_of_a_living_process_is_left_alone(store, caplog):
    """As on a file system whose locks do nothing."""
    staging = store.bundles / f".staging-{KEY[:12]}-{'0' * 32}"
    staging.mkdir(parents=True)
    owner = {"pid": os.getppid(), "host": os.uname().nodename, "since": "2026-11-24T10:00:00+00:00"}
    (staging / "owner.json").write_text(json.dumps(owner))
    publish(store)
    assert staging.exists() and f"process {os.getppid()} on" in caplog.text


def test_broken_lock_costs_only_the_work(store):
    """The second builder comes to the place that the first has taken meanwhile, and finds the work done."""
    with store.publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu") as draft:
        fill(draft)
        elsewhere = Store(store.root.parent / "elsewhere")
        winner = publish(elsewhere)
        shutil.copytree(winner.path, store.bundles / winner.path.name)
    assert draft.bundle.manifest == winner.manifest
    assert content(store) == [winner.path.name]


def test_waiting_says_for_whom(store):
    waiting, notices = threading.Event(), []

    def on_wait(notice):
        notices.append(notice)
        waiting.set()

    def second():
        with store.publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu", on_wait=on_wait) as draft:
            assert draft.done

    with store.publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu") as draft:
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(HANG_SECONDS)
        fill(draft)
    thread.join(HANG_SECONDS)
    assert not thread.is_alive()
    assert f"waiting for process {os.getpid()} on " in notices[0] and f"tiny-fp32-cpu-{KEY[:12]}" in notices[0]


# full disks and stores that cannot be written


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and "FLUX2_TRT_HOME" in text
    return text


class ForeignError(Exception):
    """As safetensors' SafetensorError: no OSError, no errno."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/store/plan"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "/store/plan"),
        ForeignError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_full_disk_while_building_is_one_line_and_leaves_nothing(store, error):
    with (
        pytest.raises(Flux2Error) as caught,
        store.publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu") as draft,
    ):
        fill(draft)
        raise error
    assert "the disk is full" in one_line(caught) and caught.value.exit_code == 1
    assert content(store) == []


def test_full_disk_while_sealing_is_one_line_and_leaves_nothing(store, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Flux2Error) as caught:
        publish(store)
    assert "the disk is full" in one_line(caught)
    assert content(store) == []


def test_read_only_store_is_one_line(store, monkeypatch):
    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(Flux2Error) as caught:
        publish(store)
    assert "Read-only file system" in one_line(caught)


def test_file_in_place_of_the_store_is_one_line(tmp_path):
    (tmp_path / "home").write_text("a file")
    with pytest.raises(Flux2Error) as caught:
        publish(Store(tmp_path / "home"))
    assert "Not a directory" in one_line(caught)


def test_errors_of_the_builder_stay_its_own(store):
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "/checkpoint.safetensors")
    with (
        pytest.raises(FileNotFoundError) as caught,
        store.publish(KEY, model=published_spec("tiny"), recipe="fp32", target="cpu"),
    ):
        raise missing
    assert caught.value is missing


# list, find, remove, verify


def test_list_shows_bundles_newest_first_and_nothing_else(store):
    assert store.list() == []
    old, new = publish(store, other_key(1)), publish(store, other_key(2), recipe="fp16")
    (store.bundles / "my-own-folder").mkdir()
    (store.bundles / "my-own-data-0123456789ab").mkdir()
    (store.bundles / "notes.txt").write_text("")
    (store.bundles / "link-fp32-cpu-0123456789ab").symlink_to(old.path)
    first, second = store.list()
    assert (first.recipe, second.recipe) == ("fp16", "fp32") and first.ok and second.ok
    assert first.path == new.path and first.key == other_key(2)
    assert second.bytes == len(PLAN) + len(WEIGHTS) + 2 and second.model == "tiny" and second.target == "cpu"


def test_list_shows_damage_with_its_problem(store):
    one, two, three = (publish(store, other_key(number)) for number in range(3))
    (one.path / "plans/transformer.onnx").write_bytes(b"short")
    (two.path / "bundle.json").unlink()
    three.path.rename(three.path.with_name(f"tiny-fp32-cpu-{'0' * 12}"))
    problems = {summary.path.name: summary.problem for summary in store.list()}
    assert "4000 bytes expected, 5 found" in problems[one.path.name]
    assert "bundle.json is missing" in problems[two.path.name]
    assert "another key" in problems[f"tiny-fp32-cpu-{'0' * 12}"]
    assert all("flux2-trt build tiny --target cpu" in problem for problem in problems.values())


def test_find_gives_the_newest_that_fits(store):
    with pytest.raises(
        BundleError, match=r"no bundle of tiny for any target in .*: flux2-trt build tiny --target auto"
    ):
        store.find("tiny")
    old, new = publish(store, other_key(1)), publish(store, other_key(2), target="rtx4090", recipe="fp8")
    assert store.find("tiny") == new.path
    assert store.find("tiny", target="cpu") == old.path
    assert store.find("tiny", recipe="fp8") == new.path
    with pytest.raises(BundleError, match=r"tiny for cpu in fp8 .*: flux2-trt build tiny --target cpu") as caught:
        store.find("tiny", "cpu", "fp8")
    assert caught.value.exit_code == 3
    with pytest.raises(BundleError, match="flux2-trt build dev --target auto"):
        store.find("dev")


def test_find_passes_over_damage_aloud(store, caplog):
    old, new = publish(store, other_key(1)), publish(store, other_key(2))
    (new.path / "plans/transformer.onnx").write_bytes(b"short")
    assert store.find("tiny") == old.path and "passing over a damaged bundle" in caplog.text
    store.remove(old.path)
    with pytest.raises(BundleError, match=r"5 found; rebuild it: flux2-trt build tiny --target cpu"):
        store.find("tiny")


def test_find_on_demand_passes_over_partial_and_synthetic_bundles(store):
    publish(store)  # one component only
    synthetic = replace(read_manifest(publish(store, other_key(1)).path), source={"random": 0})
    whole = [replace(synthetic.components[0], name=name) for name in synthetic.model.components]
    assert not replace(synthetic, components=tuple(whole)).makes_pictures
    assert replace(synthetic, components=tuple(whole), source={}).makes_pictures
    with pytest.raises(BundleError, match=r"no bundle of tiny .* flux2-trt build tiny"):
        store.find("tiny", makes_pictures=True)


def test_remove_by_name_path_and_key(store):
    bundles = [publish(store, other_key(number)) for number in range(4)]
    store.remove(bundles[0].path.name)
    store.remove(bundles[1].path)
    store.remove(other_key(2)[:8])
    (bundles[3].path / "bundle.json").write_text("{")
    assert store.remove(other_key(3)) == bundles[3].path  # damaged ones by key, too
    assert content(store) == []


def test_remove_refuses_what_is_not_one_bundle_of_the_store(store, tmp_path):
    same = [KEY[:12] + digit * 52 for digit in "12"]
    kept = [publish(store, same[0]), publish(store, same[1], recipe="fp16")]
    foreign = store.bundles / "my-own-data-0123456789ab"
    foreign.mkdir()
    outside = tmp_path / kept[0].path.name
    shutil.copytree(kept[0].path, outside)
    (store.bundles / f"link-fp32-cpu-{'0' * 12}").symlink_to(outside)
    with pytest.raises(UsageError, match=r"fits 2 bundles, name one of them: tiny-"):
        store.remove(KEY[:6])
    for which in (outside, f"../{outside.name}", "/", ".", "..", "", store.root, store.bundles / ".." / "locks"):
        with pytest.raises(UsageError, match="outside of the bundle store"):
            store.remove(which)
    for which in (foreign, foreign.name, f"link-fp32-cpu-{'0' * 12}", "tiny", KEY[:3], "*", "0" * 12):
        with pytest.raises(BundleError, match="no bundle "):
            store.remove(which)
    assert all(path.exists() for path in (kept[0].path, kept[1].path, foreign, outside / "bundle.json"))


def test_verify_hashes_everything(store):
    bundle = publish(store)
    assert store.verify(bundle.path.name).manifest == bundle.manifest
    (bundle.path / "weights/transformer.fp32.safetensors").write_bytes(b"x" * len(WEIGHTS))
    assert store.list()[0].ok  # a listing reads sizes only
    with pytest.raises(BundleError, match="sha256"):
        store.verify(KEY[:8])


def test_verify_takes_a_folder_outside_of_the_store(store, tmp_path):
    carried = tmp_path / "carried"
    shutil.copytree(publish(store).path, carried)
    assert store.verify(carried).path == carried
    (carried / "weights/transformer.fp32.safetensors").write_bytes(b"x" * len(WEIGHTS))
    with pytest.raises(BundleError, match="sha256"):
        store.verify(carried)
    with pytest.raises(BundleError, match="no bundle folder"):
        store.verify(tmp_path / "nowhere")


def test_store_root_comes_from_the_environment(monkeypatch, tmp_path):
    assert store_root({"FLUX2_TRT_HOME": str(tmp_path)}) == tmp_path
    assert store_root({"FLUX2_TRT_HOME": "~/x"}) == Path.home() / "x"
    assert store_root({"FLUX2_TRT_HOME": "here"}) == Path.cwd() / "here"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store_root({}).name == "flux2-trt"
    monkeypatch.setenv("FLUX2_TRT_HOME", str(tmp_path))
    assert Store().bundles == tmp_path / "bundles"

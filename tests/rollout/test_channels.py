"""Every way for weights to reach the server, through the same tests: a real one, over HTTP."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from rlalign.config.schema import LoraConfig
from rlalign.models.lora import adapter_config, adapter_weights, attach_lora
from rlalign.rollout.channels.ipc import IpcChannel, receive
from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams, WeightsLost
from rlalign.trainer.publish import check_engine, publish
from tests.rollout.live_server import LiveServer
from tests.rollout.test_server import moved
from tests.rollout.test_server_lora import adapted

pytestmark = [
    pytest.mark.xdist_group("server"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

WITHOUT_FILES = ["gloo", "ipc"]
CHANNELS = ["memory", "upload", *WITHOUT_FILES]
PARAMS = SamplingParams(16)
REQUEST = GenerateRequest("p", (5, 6, 7), seeds=(1, 2, 3))
LONG = [GenerateRequest(f"p{i}", (5, 6, 7 + i), seeds=tuple(range(8))) for i in range(8)]


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory) -> Iterator[LiveServer]:
    options = ("vllm.max_loras=1", "max_body_mib=1", "max_weights_mib=2")
    server = LiveServer(folder, tmp_path_factory.mktemp("server"), *options)
    yield server
    assert server.close() == 0, server.log.read_text()


@torch.no_grad()
def check(engine, model) -> None:
    ids = list(REQUEST.token_ids) * 4
    logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    check_engine(engine, ids, logp.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], 1e-3)


@pytest.mark.parametrize("channel", CHANNELS)
def test_one_update_after_the_other_is_in_use(server, folder, tokenizer, channel):
    with server.client(tokenizer, channel=channel) as engine:
        for version in (1, 2, 3):
            model = moved(folder, version)
            assert publish(engine, model.named_parameters(), version).version == version
            check(engine, model)
        [[sample, *_]] = engine.generate([REQUEST], PARAMS)
        assert sample.spans[0].version == 3


@pytest.mark.parametrize("channel", CHANNELS)
def test_an_update_in_place_is_seen(server, folder, tokenizer, channel):
    model = moved(folder, 1)
    with server.client(tokenizer, channel=channel) as engine:
        before = publish(engine, model.named_parameters(), 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
        assert publish(engine, model.named_parameters(), 2).digest != before.digest
        check(engine, model)


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("first", [True, False])
def test_weights_that_are_refused_leave_the_old_ones_and_the_channel_in_use(
    server, folder, tokenizer, channel, first
):
    model, other = moved(folder, 1), moved(folder, 2)
    names = [name for name, _ in model.named_parameters()]
    wrong = dict(other.named_parameters())
    wrong[names[0] if first else names[-1]] = torch.zeros(3, 3)
    with server.client(tokenizer, channel=channel) as engine:
        publish(engine, model.named_parameters(), 1)
        with pytest.raises(EngineError, match=r"was sent with shape \(3, 3\)"):
            engine.update_weights(wrong.items(), 2)
        check(engine, model)
        publish(engine, other.named_parameters(), 3)
        check(engine, other)


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_sender_that_breaks_off_leaves_the_old_weights_in_use(server, folder, tokenizer, channel):
    model, other = moved(folder, 1), moved(folder, 2)

    def breaks_off():
        yield from list(other.named_parameters())[:5]
        raise RuntimeError("the trainer's own fault")

    with server.client(tokenizer, channel=channel) as engine:
        publish(engine, model.named_parameters(), 1)
        with pytest.raises(RuntimeError, match="the trainer's own fault"):
            engine.update_weights(breaks_off(), 2)
        check(engine, model)
        publish(engine, other.named_parameters(), 3)
        check(engine, other)


@pytest.mark.parametrize("channel", WITHOUT_FILES)
def test_weights_that_died_with_the_engine_are_asked_for_again(server, folder, tokenizer, channel):
    model = moved(folder, 1)
    with server.client(tokenizer, channel=channel) as engine:
        publish(engine, model.named_parameters(), 1)
        undisturbed = engine.generate([REQUEST], PARAMS)
        threading.Timer(0.3, server.kill_engine).start()
        with pytest.raises(WeightsLost, match=r"the weights of version 1 .* send them again"):
            for _ in range(100):  # far more than fit into 0.3 s
                engine.generate(LONG, SamplingParams(100, ignore_eos=True))
        with pytest.raises(WeightsLost):  # nothing from other weights, whatever one asks
            engine.score([list(REQUEST.token_ids)])
        publish(engine, model.named_parameters(), 1)
        check(engine, model)
        assert engine.generate([REQUEST], PARAMS) == undisturbed
    with server.client(tokenizer) as engine:  # another job has nothing to do with it
        assert engine.generate([REQUEST], PARAMS)


@pytest.mark.parametrize("channel", CHANNELS)
def test_an_engine_that_dies_while_weights_come_asks_for_them_again(
    server, folder, tokenizer, channel
):
    model, other = moved(folder, 1), moved(folder, 2)

    def deadly():
        for i, weight in enumerate(other.named_parameters()):
            if i == 5:
                server.kill_engine()
            yield weight

    with server.client(tokenizer, channel=channel) as engine:
        publish(engine, model.named_parameters(), 1)
        began = time.monotonic()
        try:  # files may be complete before the engine is asked, and then the next one reads them
            engine.update_weights(deadly(), 2)
        except EngineError as error:
            assert channel in WITHOUT_FILES or isinstance(error, WeightsLost)
        assert time.monotonic() - began < 60
        publish(engine, other.named_parameters(), 2)
        check(engine, other)


def test_an_adapter_of_a_strange_type_is_refused_and_the_engine_lives(server, folder, tokenizer):
    pid = server.engine_pid()
    model = AutoModelForCausalLM.from_pretrained(folder)
    attach_lora(model, LoraConfig(rank=4, alpha=8), 0)
    strange = [(n, p.to(torch.float8_e4m3fn)) for n, p in adapter_weights(model)]
    with server.client(tokenizer, "l", adapter_config(model)) as engine:
        with pytest.raises(EngineError, match="cannot be read"):
            engine.update_weights(strange, 1)
        publish(engine, adapter_weights(model), 2)
    assert server.engine_pid() == pid


@pytest.mark.parametrize("channel", ["memory", "upload"])
def test_weights_in_files_come_back_with_the_engine(server, folder, tokenizer, channel):
    model = moved(folder, 1)
    with server.client(tokenizer, channel=channel) as engine:
        publish(engine, model.named_parameters(), 1)
        undisturbed = engine.generate([REQUEST], PARAMS)
        server.kill_engine()
        assert engine.generate([REQUEST], PARAMS) == undisturbed


@pytest.mark.parametrize("channel", ["memory", "upload"])
def test_adapters_go_as_files(server, folder, tokenizer, channel):
    model = adapted(folder, 0)
    with server.client(tokenizer, "l", adapter_config(model), channel=channel) as engine:
        assert engine.capabilities.adapter_only
        publish(engine, adapter_weights(model), 1)
        check(engine, model)


@pytest.mark.parametrize("channel", WITHOUT_FILES)
def test_adapters_do_not_go_without_files(server, folder, tokenizer, channel):
    model = AutoModelForCausalLM.from_pretrained(folder)
    attach_lora(model, LoraConfig(rank=4, alpha=8), 0)
    with pytest.raises(EngineError, match=f"channel={channel} does not carry adapters"):
        server.client(tokenizer, "l", adapter_config(model), channel=channel)
    deadline = time.monotonic() + 10
    while server.state()["jobs"]:  # the lease was given back
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nccl_without_a_gpu_says_so(server, tokenizer):
    if torch.cuda.is_available() and dist.is_nccl_available():
        pytest.skip("there is one")
    with pytest.raises(EngineError, match="need a GPU and a torch with NCCL"):
        server.client(tokenizer, channel="nccl")


def test_uploads_at_once_are_bounded_together(server, tokenizer):
    with server.client(tokenizer, channel="upload") as engine:
        codes: list[int] = []

        def put(i: int) -> None:
            with server.http("job") as http:
                path = f"{engine._job}/weights/1/00000{i}.safetensors"
                codes.append(http.put(path, content=b"x" * 2**20).status_code)

        threads = [threading.Thread(target=put, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(codes) == [200, 200, 413, 413, 413, 413]  # 2 MiB in all


def test_an_upload_is_bounded_and_its_names_are_its_own(server, tokenizer):
    with server.client(tokenizer, channel="upload") as engine, server.http("job") as http:
        put = f"{engine._job}/weights"
        assert http.put(f"{put}/1/000000.safetensors", content=b"x" * 2**20).status_code == 200
        answer = http.put(f"{put}/1/000001.safetensors", content=b"x" * (2**20 + 1))
        assert answer.status_code == 413 and "max_weights_mib" in answer.json()["error"]
        for name in ("1/x.py", "1/..", "-1/000000.safetensors", "taken-0/000000.safetensors"):
            assert http.put(f"{put}/{name}", content=b"x").status_code in (400, 404, 405), name
        answer = http.post(put, json={"version": 1})
        assert answer.status_code == 400 and "cannot be read" in answer.json()["error"]


def test_handles_give_the_very_memory():
    """Of one process only: another one opens them in the tests above."""
    base = torch.randn(4, 6)
    weights = {"a": base[1:3].T, "b": base, "c": torch.ones(3, dtype=torch.bfloat16)}
    got: dict[str, torch.Tensor] = {}

    def post(announced):
        assert len(announced["storages"]) == 2
        got.update(receive(announced))
        for name, value in weights.items():
            assert torch.equal(got[name], value) and got[name].dtype == value.dtype
        base.zero_()
        assert not got["a"].any()
        return {"version": 1, "digest": ""}

    IpcChannel().send(weights.items(), 1, post)


SHARED = {"name": "x", "dtype": "float32", "shape": [2], "stride": [1], "offset": 0, "storage": 0}
MANAGER = b"/tmp/none".hex()
STRANGE = [
    {"channel": "ipc", "storages": [], "tensors": [SHARED]},
    {"channel": "ipc", "storages": [["00"]], "tensors": []},
    {"channel": "ipc", "storages": [["zz", "zz", 64]], "tensors": [SHARED]},
    {"channel": "ipc", "storages": [[1, 2, 3]], "tensors": [SHARED]},
    {"channel": "ipc", "storages": [[MANAGER, b"/none".hex(), 64]], "tensors": [SHARED]},
    {"channel": "ipc", "storages": [], "tensors": []},
    {"channel": "group", "backend": "gloo", "port": 1, "group": "", "update": "x"},
    {"channel": "group", "backend": "nccl", "port": 1, "group": "", "update": "x"},
]


def test_strange_announcements_are_refused_and_the_engine_lives(server, folder, tokenizer):
    pid, model = server.engine_pid(), moved(folder, 1)
    with server.client(tokenizer) as engine, server.http("job") as http:
        publish(engine, model.named_parameters(), 1)
        for announcement in STRANGE:
            answer = http.post(f"{engine._job}/weights", json={"version": 2, **announcement})
            assert answer.status_code == 400 and answer.json()["error"], announcement
        check(engine, model)
    assert server.engine_pid() == pid

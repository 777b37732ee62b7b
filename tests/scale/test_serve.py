"""`fastdiff serve`: batching, the HTTP interface, and a real server under too much work."""

import asyncio
import base64
import hashlib
import io
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("ray.serve", reason="needs Ray")

import aiohttp  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from fastdiff.cli import main  # noqa: E402
from fastdiff.scale.app import make_app  # noqa: E402
from fastdiff.scale.artist import Artist, ModelChoice, png_bytes  # noqa: E402
from fastdiff.scale.batching import Batcher  # noqa: E402
from fastdiff.scale.gate import MAX_BODY, Gate, key_digest  # noqa: E402
from fastdiff.scale.listening import is_loopback  # noqa: E402
from fastdiff.scale.painter import Painter  # noqa: E402
from fastdiff.scale.requests import PictureRequest  # noqa: E402
from fastdiff.scale.waiting import Limits, NoWorker  # noqa: E402

# 8 s of overload in the default run; FASTDIFF_OVERLOAD_SECONDS=120 for the run that is reported.
OVERLOAD_SECONDS = float(os.environ.get("FASTDIFF_OVERLOAD_SECONDS", "8"))
START_SECONDS = 300
WORKERS = min(2, os.cpu_count() or 1)
KEY = "correct-horse-battery"
SMALL = {"size": "64x64", "steps": 2}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def artist():
    return Artist(ModelChoice(model=None, preset="exact", dtype=None, device="cpu", threads=1))


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


# Pictures do not depend on their company


def test_a_batched_picture_equals_the_one_drawn_alone(artist):
    requests = [
        PictureRequest(prompt=prompt, seed=seed, size="64x64", steps=4, negative_prompt=negative)
        for prompt, seed, negative in [
            ("a red circle on a blue background", 1, "blue"),
            ("a green square", 2, ""),
            ("a red circle on a blue background", 3, "a long list of things that are not wanted"),
            ("a yellow triangle on a white background " * 9, 1, "blue"),
        ]
    ]
    alone = [artist.draw([request], output_type="pt")[0] for request in requests]
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 7):
        together = artist.draw([requests[index] for index in order], output_type="pt")
        for index, picture in zip(order, together, strict=True):
            assert (picture - alone[index]).abs().max() < 1e-4
    assert (alone[0] - alone[2]).abs().max() > 0.01  # the comparison would see another seed


def test_requests_share_a_batch_only_with_their_kind(artist):
    base = {"prompt": "x", "seed": 1, **SMALL}
    key = artist.batch_key(PictureRequest(**base))
    assert artist.batch_key(PictureRequest(**{**base, "prompt": "y", "seed": 2})) == key
    others = ({"steps": 3}, {"size": "64x72"}, {"guidance": 1.0}, {"negative_prompt": ""}, {"size": None})
    for change in others:
        assert artist.batch_key(PictureRequest(**{**base, **change})) != key
    default = PictureRequest(prompt="x")
    named = PictureRequest(prompt="x", size="x".join(map(str, artist.native_size)))
    assert artist.batch_key(named) == artist.batch_key(default)


def test_large_pictures_make_small_batches(artist):
    def limit(size):
        return artist.batch_limit(PictureRequest(prompt="x", size=size), 4)

    assert [limit(None), limit("64x64"), limit("256x128"), limit("2048x2048")] == [4, 4, 2, 1]


# Batching


def run_batches(items, key=lambda item: 0, limit=3, cancel=(), fail=()):
    """Submit items while the first is being run; returns the batches and what each submitter got."""
    batches, gate = [], threading.Event()

    def run(batch, wanted):
        batches.append(list(batch))
        gate.wait(10)
        if set(batch) & set(fail):
            raise ValueError("no")
        return [f"drew {item}" for item in batch]

    async def scenario():
        batcher = Batcher(run, key=key, limit=lambda item: limit)
        tasks = []
        for item in items:
            tasks.append(asyncio.create_task(batcher.submit(item)))
            await asyncio.sleep(0.02)
        for index in cancel:
            tasks[index].cancel()
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    return batches, asyncio.run(scenario())


def test_the_oldest_goes_next_with_its_kind():
    items = ["a0", "b1", "a2", "b3", "b4", "b5", "a6"]
    batches, answers = run_batches(items, key=lambda item: item[0])
    assert batches == [["a0"], ["b1", "b3", "b4"], ["a2", "a6"], ["b5"]]
    assert answers == [f"drew {item}" for item in items]


def test_who_has_left_is_not_drawn_for():
    batches, answers = run_batches([0, 1, 2, 3], cancel=[1, 3])
    assert batches == [[0], [2]]
    assert [type(answer) for answer in answers] == [str, asyncio.CancelledError, str, asyncio.CancelledError]


def test_a_failed_batch_fails_alone():
    batches, answers = run_batches([0, 1, 2, 3, 4], limit=2, fail=[2])
    assert batches == [[0], [1, 2], [3, 4]]
    assert [isinstance(answer, ValueError) for answer in answers] == [False, True, True, False, False]


def test_a_batch_that_nobody_waits_for_stops_early(artist):
    asked = []

    def after_step(done):
        asked.append(done)
        return len(asked) < 3

    artist.draw([PictureRequest(prompt="x", seed=1, size="64x64", steps=50)], after_step)
    assert asked == [1, 2, 3]
    # The interruption ends with its call.
    [picture] = artist.draw([PictureRequest(prompt="x", seed=1, **SMALL)])
    [again] = artist.draw([PictureRequest(prompt="x", seed=1, **SMALL)])
    assert np.array_equal(picture, again)


# The HTTP interface, over a real pipeline in this process


def local_app(artist, limits=None, **options):
    """The application with its painter in this process rather than in Ray's."""
    limits = limits or Limits(queue=8, timeout=60, steps=4, pixels=64 * 128)

    async def one():
        return 1

    async def text():
        return b"# nothing measured\n"

    return make_app(Painter(artist, 4).draw, one, text, limits, **options)


@pytest.fixture(scope="module")
def client(artist):
    with TestClient(local_app(artist), raise_server_exceptions=False) as client:
        yield client


def test_png_and_json_hold_the_same_picture(client, artist):
    body = {"prompt": "a red circle", "seed": 5, **SMALL}
    png = client.post("/generate", json=body)
    assert (png.status_code, png.headers["content-type"]) == (200, "image/png")
    assert (png.headers["x-seed"], png.headers["x-size"]) == ("5", "64x64")
    answer = client.post("/generate", json={**body, "output": "json"}).json()
    assert base64.b64decode(answer["image"]) == png.content
    assert (answer["seed"], answer["size"], answer["steps"]) == (5, "64x64", 2)
    assert png.content == png_bytes(artist.draw([PictureRequest(**body)])[0])


def test_a_seed_is_chosen_and_told(client):
    body = {"prompt": "a red circle", **SMALL}
    first, second = client.post("/generate", json=body), client.post("/generate", json=body)
    assert first.headers["x-seed"] != second.headers["x-seed"]
    again = client.post("/generate", json={**body, "seed": int(first.headers["x-seed"])})
    assert again.content == first.content != second.content


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": "x" * 3000}, "prompt"),
        ({"prompt": " \n "}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["x"]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"\ud800": 1}, "unicode"),
        ({"x" * 50_000: 1}, "xxx"),
        ({"steps": 5}, "steps"),
        ({"steps": 0}, "steps"),
        ({"steps": 10**400}, "steps"),
        ({"steps": "2"}, "steps"),
        ({"steps": True}, "steps"),
        ({"size": "100000x100000"}, "size"),
        ({"size": "4096x4096"}, "8192"),
        ({"size": "65x64"}, "multiples of 8"),
        ({"size": [64, 64]}, "size"),
        ({"size": "\u0666\u0664x64"}, "size"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": float("inf")}, "guidance"),
        ({"guidance": 51}, "guidance"),
        ({"output": "exe"}, "output"),
        ({"model": "../../../etc/passwd"}, "model"),
        ({"model": "stabilityai/stable-diffusion-xl-base-1.0"}, "model"),
        ({"lora": "x"}, "lora"),
    ],
)
def test_what_is_wrong_is_named(client, change, says):
    body = json.dumps({"prompt": "x", **SMALL, **change})
    answer = client.post("/generate", content=body, headers=JSON)
    assert answer.status_code == 422
    assert says in json.dumps(answer.json())
    assert len(answer.content) < 2000


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"", JSON, 422),
        (b"{", JSON, 422),
        (b"null", JSON, 422),
        (b"[" * 60_000, JSON, 400),
        (b'{"seed": ' + b"9" * 60_000 + b"}", JSON, 400),
        (b"\xff\xfe", JSON, 422),
        (b'{"prompt": "x"}', {"Content-Type": "text/plain"}, 415),
        (b'{"prompt": "x"}', {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        (b'{"prompt": "x"}', {"Content-Type": "application/json-not"}, 415),
        (b'{"prompt": "x"}', {}, 415),
        (b'{"prompt": "' + b"x" * 1_000_000 + b'"}', JSON, 413),
        (iter([b" " * 40_000] * 3), JSON, 413),
    ],
)
def test_bodies_that_are_no_request(client, content, headers, status):
    answer = client.post("/generate", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    assert answer.json()["detail"]
    assert client.get("/health").json() == {"status": "ok", "workers": 1, "requests": 0}


def read_events(text):
    """[(name, data), ...] of an answer of server-sent events."""
    pairs = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


def test_events_tell_each_step_and_then_the_picture(client, artist):
    body = {"prompt": "a red circle", "seed": 5, "size": "64x64", "steps": 4}
    answer = client.post("/generate", json={**body, "output": "events"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *steps, (name, picture) = read_events(answer.text)
    assert steps == [("step", {"done": done, "steps": 4}) for done in range(5)]
    assert name == "picture" and picture["seed"] == 5
    assert base64.b64decode(picture["image"]) == png_bytes(artist.draw([PictureRequest(**body)])[0])


def test_events_end_with_the_reason_where_there_is_no_picture(artist):
    async def dies(request, report):
        report(1)
        raise NoWorker("the worker died")

    async def one():
        return 1

    with TestClient(make_app(dies, one, one, Limits())) as client:
        answer = client.post("/generate", json={"prompt": "x", "output": "events"})
        assert read_events(answer.text)[-1] == ("error", {"detail": "the worker died"})
        assert client.get("/health").json()["requests"] == 0


def test_a_picture_that_no_memory_holds_fails_alone(artist):
    with pytest.raises(ValueError, match="GiB or more to decode"):
        artist.draw([PictureRequest(prompt="x", seed=1, size="90000x90000")])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=8), values, max_size=3),
    max_leaves=6,
)
FIELDS = ("prompt", "negative_prompt", "seed", "size", "steps", "guidance", "output", "model", "__class__")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=5) | JSON_VALUES)
@example({"prompt": "nul \0 in the text", "size": "64x64", "steps": 1})
@example({"prompt": "\u202e\ufeff \U0001f600" * 50, "size": "64x64", "steps": 1})
def test_no_json_brings_the_server_down(client, body):
    if isinstance(body, dict):
        body = {"size": "64x64", "steps": 1, **body}
    answer = client.post("/generate", content=json.dumps(body), headers=JSON)
    assert answer.status_code in (200, 400, 422), answer.text
    if answer.status_code == 200:
        assert Image.open(io.BytesIO(answer.content)).size == (64, 64) or body.get("output") == "json"


def test_the_server_does_as_its_description_says(artist):
    schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis")
    from schemathesis import checks

    app = local_app(artist, Limits(queue=8, timeout=60, steps=2, pixels=64 * 64))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    chosen = [
        checks.not_a_server_error,
        schemathesis.specs.openapi.checks.status_code_conformance,
        schemathesis.specs.openapi.checks.content_type_conformance,
        schemathesis.specs.openapi.checks.response_schema_conformance,
        schemathesis.specs.openapi.checks.negative_data_rejection,
        schemathesis.specs.openapi.checks.unsupported_method,
    ]
    seen = set()
    for operation in schema.get_all_operations():
        cases = operation.ok().as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
        wrong = operation.ok().as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
        for strategy in (cases, wrong) if operation.ok().path == "/generate" else (cases,):

            @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(strategy)
            def call(case):
                response = case.call()
                seen.add((case.operation.path, response.status_code))
                case.validate_response(response, checks=chosen)

            call()
    assert {("/generate", 200), ("/generate", 422), ("/health", 200), ("/metrics", 200)} <= seen


def test_requests_beyond_the_queue_get_429_and_late_ones_504(artist):
    release = threading.Event()

    async def slow(request, report):
        await asyncio.to_thread(release.wait, 30)
        raise NoWorker("the worker died")

    async def one():
        return 0

    app = make_app(slow, one, one, Limits(queue=2, timeout=0.5))
    with TestClient(app) as client:
        answers = []

        def ask():
            answers.append(client.post("/generate", json={"prompt": "x"}))

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [429, 429, 429, 504, 504]
        assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
        release.set()
        answer = client.post("/generate", json={"prompt": "x"})  # the places are free again
        assert (answer.status_code, answer.json()["detail"]) == (503, "the worker died")
        assert client.get("/health").status_code == 503


def test_with_a_key_only_its_holder_draws(artist):
    with TestClient(local_app(artist, digest=key_digest(KEY))) as client:
        body = {"prompt": "x", "seed": 1, **SMALL}
        for path in ("/", "/health", "/openapi.json"):
            assert client.get(path).status_code == 200
        for wrong in (None, KEY, f"Bearer {KEY}x", "Bearer ", f"Basic {KEY}", "Bearer \xe4"):
            wrong = {} if wrong is None else {"Authorization": wrong.encode("latin-1")}
            answer = client.post("/generate", json=body, headers=wrong)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert client.get("/metrics", headers=wrong).status_code == 401
        # Whoever has no key learns nothing about the body, and cannot have it read.
        assert client.post("/generate", content=b" " * (MAX_BODY + 1)).status_code == 401
        for scheme in ("Bearer", "bearer"):
            right = {"Authorization": f"{scheme} {KEY}"}
            assert client.post("/generate", json=body, headers=right).status_code == 200
        assert "HTTPBearer" in client.get("/openapi.json").text


def test_a_local_server_answers_to_its_own_names(artist):
    with TestClient(local_app(artist, hosts=frozenset({"localhost", "[::1]"}))) as client:
        for host in ("localhost:99", "[::1]:99", "LOCALHOST"):
            assert client.get("/health", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example", ""):
            assert client.get("/health", headers={"Host": host}).status_code == 400


def test_a_body_that_does_not_end_gets_408():
    sent = []

    async def receive():
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message):
        sent.append(message)

    async def app(scope, receive, send):
        raise AssertionError("an unfinished body went on")

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [(b"content-type", b"application/json")]}
    asyncio.run(Gate(app, None, None, body_seconds=0.2)(scope, receive, send))
    assert sent[0]["status"] == 408


def test_the_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http:" not in answer.text and "https:" not in answer.text and "src=" not in answer.text
    assert "{{" not in answer.text and "Up to 4 steps and 8192 pixels" in answer.text
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404


# The command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "FASTDIFF_API_KEY"),
        (["--host", "192.0.2.7"], "FASTDIFF_API_KEY"),
        (["--host", "::"], "FASTDIFF_API_KEY"),
        (["--port", "0"], "--port"),
        (["--port", "99999"], "--port"),
        (["--max-batch", "0"], "--max-batch"),
        (["--queue", "-1"], "--queue"),
        (["--preset", "fastest"], "fastest"),
        (["--model", "../nowhere"], "nowhere"),
        (["--api-key-file", "/no/such/file"], "--api-key-file"),
    ],
)
def test_bad_arguments_end_the_command_before_any_work(capsys, monkeypatch, arguments, says):
    monkeypatch.delenv("FASTDIFF_API_KEY", raising=False)
    assert main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_short_keys_and_taken_ports_are_refused(capsys, monkeypatch):
    monkeypatch.setenv("FASTDIFF_API_KEY", "short")
    assert main(["serve"]) == 2
    assert "16" in capsys.readouterr().err
    monkeypatch.delenv("FASTDIFF_API_KEY")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen" in capsys.readouterr().err


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org", "")))


# A real server on Ray


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server on a local Ray: (its URL, its process). Ends with SIGINT, and must leave nothing behind."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    code = "import sys; from fastdiff.cli import main; sys.exit(main())"
    arguments = ["--preset", "exact", "--device", "cpu", "--port", str(port)]
    arguments += ["--queue", "12", "--timeout", "60", "--replicas", str(WORKERS)]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            # At Ray's own niceness of 15 its workers starve beside anything else that runs.
            env={**os.environ, "RAY_worker_niceness": "0"},
        )
    tree = []
    try:
        end = time.monotonic() + START_SECONDS
        while "serving on" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", process
        tree = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(180) == 0, log.read_text()
        _, alive = psutil.wait_procs(tree, timeout=120)
        assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    finally:
        process.kill()
        for left in tree:
            if left.is_running():
                left.kill()


def get(url, body=None, headers=JSON):
    """(status, contents) of a request."""
    request = urllib.request.Request(url, body if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=90) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_server_draws_what_the_pipeline_draws(server, artist):
    url, _ = server
    body = {"prompt": "a red circle on a blue background", "seed": 3, "size": "64x64", "steps": 4}
    status, png = get(f"{url}/generate", body)
    assert status == 200
    [picture] = artist.draw([PictureRequest(**body)])
    assert np.abs(pixels(png) - np.asarray(picture).astype(int)).max() <= 1  # the server may use more threads


def test_the_server_stays_up_under_hostile_requests(server):
    url, _ = server
    assert get(f"{url}/generate", {"prompt": "x" * 1_000_000})[0] == 413
    assert get(f"{url}/generate", {"prompt": "x", "model": "../../etc"})[0] == 422
    assert get(f"{url}/generate", {"prompt": "x", "size": "99999x99999"})[0] == 422
    assert get(f"{url}/generate", "[" * 50_000)[0] in (400, 422)
    assert get(f"{url}/../../etc/passwd")[0] == 404
    assert get(f"{url}/health", headers={"Host": "evil.example"})[0] == 400
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as raw:
        raw.sendall(b"\0\xff not http \r\n\r\n")
        raw.settimeout(10)
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    assert json.loads(get(f"{url}/health")[1]) == {"status": "ok", "workers": WORKERS, "requests": 0}


def batches_drawn(url):
    """(batches, pictures in them) since the server started, as its metrics tell."""
    counts = {"batches": 0.0, "pictures": 0.0}
    for line in get(f"{url}/metrics")[1].decode().splitlines():
        for name in counts:
            if line.startswith(f"ray_fastdiff_{name}_total{{"):
                counts[name] += float(line.rpartition(" ")[2])
    return counts["batches"], counts["pictures"]


def wait_for_batches(url, pictures):
    end = time.monotonic() + 180  # Ray exports every few seconds
    while batches_drawn(url)[1] < pictures:
        assert time.monotonic() < end
        time.sleep(1)
    return batches_drawn(url)


def test_metrics_are_those_of_ray(server):
    url, _ = server
    assert get(f"{url}/generate", {"prompt": "x", **SMALL})[0] == 200
    assert wait_for_batches(url, 1)[0] >= 1
    end = time.monotonic() + 180
    while b"ray_serve_num_http_requests" not in get(f"{url}/metrics")[1]:
        assert time.monotonic() < end
        time.sleep(1)


def unshared_memory(process):
    """Bytes of a process tree; pages that are shared count once."""
    total = 0
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        try:
            total += one.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def test_too_much_work_gets_answers_all_the_same(server, artist):
    url, process = server
    body = {"prompt": "a red circle on a blue background", "size": "64x64", "steps": 20}
    seeds = itertools.count()
    answers, memory = [], []

    async def ask(session):
        seed, started = next(seeds), time.monotonic()
        async with session.post(f"{url}/generate", json={**body, "seed": seed}) as answer:
            contents = await answer.read()
            answers.append((answer.status, time.monotonic() - started, seed, contents, dict(answer.headers)))

    async def closed_loop(session, until):
        while time.monotonic() < until:
            await ask(session)

    async def scenario():
        timeout = aiohttp.ClientTimeout(total=90)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
            measured = min(10.0, OVERLOAD_SECONDS / 2)
            for seconds in (1.0, measured):  # the first second warms up
                answers.clear()
                began = time.monotonic()
                await asyncio.gather(*[closed_loop(session, began + seconds) for _ in range(8)])
                capacity = len(answers) / (time.monotonic() - began)
            answers.clear()
            tasks, began, samples, due, before = [], time.monotonic(), 0, 0.0, 0.0
            while (now := time.monotonic() - began) < OVERLOAD_SECONDS:
                # Never less than four times what the server turns out to draw, should it be faster by now.
                drawn = sum(answer[0] == 200 for answer in answers)
                due += 4 * max(capacity, drawn / max(now, 1.0)) * (now - before)
                before = now
                while len(tasks) < due:
                    tasks.append(asyncio.create_task(ask(session)))
                if now >= samples * OVERLOAD_SECONDS / 8:
                    samples += 1
                    memory.append(await asyncio.to_thread(unshared_memory, process))
                await asyncio.sleep(0.02)
            await asyncio.gather(*tasks)
        return capacity, len(tasks)

    batches_before, pictures_before = batches_drawn(url)
    capacity, sent = asyncio.run(scenario())
    by_status = {s: [a for a in answers if a[0] == s] for s in sorted({a[0] for a in answers})}
    assert len(answers) == sent
    assert set(by_status) <= {200, 429, 504} and by_status[200] and by_status[429]
    assert all(int(answer[4]["Retry-After"]) >= 1 for answer in by_status[429])
    latencies = sorted(answer[1] for answer in by_status[200])
    p50, p95 = statistics.median(latencies), latencies[int(0.95 * (len(latencies) - 1))]
    counts = {status: len(group) for status, group in by_status.items()}
    print(
        f"\ncapacity {capacity:.1f}/s; {sent} requests in {OVERLOAD_SECONDS:g} s: {counts}; "
        f"p50 {p50:.2f} s, p95 {p95:.2f} s; MiB {[round(m / 2**20) for m in memory]}"
    )
    for _, _, seed, contents, _ in by_status[200][:: max(1, len(by_status[200]) // 20)]:
        [alone] = artist.draw([PictureRequest(**body, seed=seed)])
        assert np.abs(pixels(contents) - np.asarray(alone).astype(int)).max() <= 1
    assert len({hashlib.sha256(answer[3]).digest() for answer in by_status[200]}) == len(by_status[200])
    batches, pictures = wait_for_batches(url, pictures_before + len(by_status[200]))
    together = (pictures - pictures_before) / (batches - batches_before)
    print(f"{together:.2f} pictures in a batch")
    assert together > 1.5
    if OVERLOAD_SECONDS >= 60:
        assert memory[-1] < 1.1 * memory[len(memory) // 4]
    assert json.loads(get(f"{url}/health")[1]) == {"status": "ok", "workers": WORKERS, "requests": 0}


def painters_of(process):
    tree = psutil.Process(process.pid).children(recursive=True)
    return [one for one in tree if "painter" in " ".join(one.cmdline()) and "Serve" in " ".join(one.cmdline())]


@pytest.mark.skipif(WORKERS < 2, reason="needs a second worker, and so a second CPU core")
def test_a_request_outlives_its_worker(server, artist):
    url, process = server
    body = {"prompt": "a red circle", "steps": 60, "size": "128x128"}
    answers = {}

    def ask(seed):
        answers[seed] = get(f"{url}/generate", {**body, "seed": seed})

    asking = [threading.Thread(target=ask, args=[seed]) for seed in range(6)]
    for thread in asking:
        thread.start()
    while json.loads(get(f"{url}/health")[1])["requests"] < len(asking):
        assert not answers, "the pictures came too soon to test anything"
    killed = painters_of(process)
    assert len(killed) == WORKERS
    killed[0].kill()
    for thread in asking:
        thread.join(90)
    assert [status for status, _ in answers.values()] == [200] * len(asking)
    for seed in (0, 5):
        [alone] = artist.draw([PictureRequest(**body, seed=seed)])
        assert np.abs(pixels(answers[seed][1]) - np.asarray(alone).astype(int)).max() <= 1
    end = time.monotonic() + START_SECONDS
    while json.loads(get(f"{url}/health")[1])["workers"] < WORKERS:
        assert time.monotonic() < end
        time.sleep(1)

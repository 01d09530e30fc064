"""
What keeping keys and values from turn to turn saves, and what letting every query go on by itself saves.

First, conversations of several turns with pictures: each turn reads only what is new, against each turn reading the
whole conversation again, pictures through the tower included. Then queries of several windows whose lengths are
log-normal: each query goes on as soon as its window is done, against static batches in which all wait for the slowest.

    python tests/benchmarks/turns_and_windows.py [--model NAME] [--device cuda] [--tokens 1 16 64 256] [--repeats 3]

With 1 token a turn, what is compared is prefill and vision alone. With random weights in the shape of Qwen2.5-VL-7B
and 20 candidates, on one GPU:

    python tests/benchmarks/turns_and_windows.py --random --candidates 20 --repeats 1
"""

from __future__ import annotations

import argparse
import random
import statistics
from functools import partial

import subject
from timing import alternate, tell

from vretrver_hf.agent import AgentTask
from vretrver_hf.encoding import Encoded
from vretrver_hf.engines import Sampling
from vretrver_hf.tools import VisualTools
from vretrver_hf.vision import PictureFeatures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser)
    parser.add_argument("--turns", type=int, default=4, help="model turns of each conversation")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 64, 256], help="tokens of each model turn")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--median", type=float, default=25, help="median of the windows' tokens")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    reranker = subject.load(args)
    engine = reranker.engine
    engine.encoder.stop_ids, engine.encoder.end_of_call = [], -1  # every turn is as long as it is told
    tasks = subject.make_tasks(args, reranker.preset, args.rows)
    pieces = [conversation(engine.encoder, task, args.turns) for task in tasks]
    for tokens in args.tokens:
        print(f"\n{args.rows} conversations of {args.turns} turns of {tokens} tokens")
        kept = partial(play, engine, pieces, tokens, again=False)
        tell(alternate({"all of it again": partial(play, engine, pieces, tokens, True), "kept": kept}, args.repeats))

    lengths = draw_lengths(args.queries, args.windows, args.median)
    flat = [length for windows in lengths for length in windows]
    spread = statistics.pstdev(flat) / statistics.mean(flat)
    print(f"\n{args.queries} queries of {args.windows} windows, CV of their lengths {spread:.2f}")
    prompt = pieces[0][0]
    medians = alternate(
        {
            "static batches": partial(in_batches, engine, prompt, lengths),
            "each by itself": partial(by_themselves, engine, prompt, lengths),
        },
        args.repeats,
        warm_up=False,
    )
    tell(medians)


def conversation(encoder, task: AgentTask, turns: int) -> list[Encoded]:
    """What one conversation reads: a prompt with pictures, then crops and selected pictures in turn."""
    pictures = [item.load_image() if item.image is not None else None for item in [task.query, *task.candidates]]
    tools = VisualTools(pictures[0], pictures[1:], preset=task.preset, factor=encoder.factor)
    pieces = [encoder.prompt(task.messages(), pictures.__getitem__, task.preset)]
    for turn in range(turns - 1):
        seen = tools.crop_image([0, 0, 0.5, 0.5], 1 + turn % 3) if turn % 2 else tools.select_images([1, 2])
        pieces.append(encoder.observation(seen))
    return pieces


def play(engine, conversations: list[list[Encoded]], tokens: int, again: bool) -> None:
    """All conversations to their ends; `again` reads and sees everything anew in each turn."""
    image_processor = engine.encoder.processor.image_processor
    engine.features = PictureFeatures(engine.model.model.visual, image_processor, 0 if again else 2**30)
    sampling = Sampling(max_turn_tokens=tokens)
    turn_of, sessions, history = {}, [], {}
    for row, pieces in enumerate(conversations):
        session = engine.open(str(row))
        turn_of[session], history[session] = 0, pieces[0]
        sessions.append(session)
        engine.submit(session, pieces[0], sampling)
    while sessions:
        for result in engine.poll(sessions):
            session = result.session
            sessions.remove(session)
            row, turn = int(session.query_id), turn_of.pop(session) + 1
            whole = history.pop(session)
            if turn == len(conversations[row]):
                engine.close(session)
                continue
            piece = conversations[row][turn]
            ids, images = [*whole.token_ids, *result.token_ids, *piece.token_ids], [*whole.images, *piece.images]
            whole = Encoded(ids, images, [], "")
            if again:
                engine.close(session)
                session = engine.open(str(row))
            turn_of[session], history[session] = turn, whole
            sessions.append(session)
            engine.submit(session, whole if again else piece, sampling)


def draw_lengths(queries: int, windows: int, median: float) -> list[list[int]]:
    source = random.Random(0)
    draw = lambda: max(1, round(median * source.lognormvariate(0, 0.8)))  # noqa: E731
    return [[draw() for _ in range(windows)] for _ in range(queries)]


def by_themselves(engine, prompt: Encoded, lengths: list[list[int]]) -> None:
    """A query's next window begins as soon as its last one is done, and another query as soon as one is finished."""
    waiting = [iter(windows) for windows in lengths]
    running = {}
    while waiting or running:
        while waiting and len(running) < engine.max_sessions:
            begin(engine, prompt, waiting.pop(0), running)
        for result in engine.poll(list(running)):
            windows = running.pop(result.session)
            engine.close(result.session)
            begin(engine, prompt, windows, running)


def in_batches(engine, prompt: Encoded, lengths: list[list[int]]) -> None:
    """As many queries as the batch holds, window after window; all wait for the slowest."""
    for start in range(0, len(lengths), engine.max_sessions):
        for windows in zip(*lengths[start : start + engine.max_sessions], strict=True):
            running = {}
            for length in windows:
                begin(engine, prompt, iter([length]), running)
            while running:
                for result in engine.poll(list(running)):
                    del running[result.session]
                    engine.close(result.session)


def begin(engine, prompt: Encoded, windows, running: dict) -> None:
    length = next(windows, None)
    if length is not None:
        session = engine.open()
        engine.submit(session, prompt, Sampling(max_turn_tokens=length))
        running[session] = windows


if __name__ == "__main__":
    main()

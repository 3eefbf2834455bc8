"""Many users at once: asyncio tasks ask one pipeline, each reads its own answer as it comes.

    python samples/many_users.py                         # the default model
    python samples/many_users.py ./my-model --users 8

One thread steps the model for all of them; a task that waits for tokens lets the others run.
"""

import argparse
import asyncio

from ov_kvcrush import ChatHistory, ContinuousBatchingPipeline, RequestTimeout

QUESTIONS = ["What is the capital of France?", "Name three colours.", "What is two plus two?", "Who wrote Hamlet?"]


async def ask(pipe: ContinuousBatchingPipeline, user: int, timeout_s: float) -> None:
    question = QUESTIONS[user % len(QUESTIONS)]
    history = ChatHistory([{"role": "user", "content": question}])
    handle = pipe.add_request(user, history, max_new_tokens=24, timeout_s=timeout_s)
    tokens: list[int] = []
    try:
        async for outputs in handle:
            tokens += outputs[0].generated_ids
            if len(tokens) == 1:
                print(f"user {user}: first token")
    except RequestTimeout as error:
        print(f"user {user}: {error}")
    text = pipe.get_tokenizer().decode(tokens)
    print(f"user {user}: {question} {text!r} ({handle.end_reason.value})")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of an exported model; the default model if omitted")
    parser.add_argument("--users", type=int, default=4, help="questions at the same time")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that an answer may take")
    args = parser.parse_args()
    pipe = ContinuousBatchingPipeline(args.model)
    await asyncio.gather(*(ask(pipe, user, args.timeout) for user in range(args.users)))


if __name__ == "__main__":
    asyncio.run(main())

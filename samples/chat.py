"""A conversation that keeps its KV: each turn computes only what is new.

    python samples/chat.py                               # the default model
    python samples/chat.py ./my-model < questions.txt
    python samples/chat.py ./my-model --budget 1/6       # the cache in a sixth of the bytes of bf16

Type one question a line; an empty line ends.
"""

import argparse

import ov_kvcrush


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of an exported model; the default model if omitted")
    parser.add_argument("--system", default="You answer in one short sentence.")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--budget", help="bytes of the KV cache over those of bf16, as 1/6; all stays if omitted")
    args = parser.parse_args()

    pipe = ov_kvcrush.LLMPipeline(args.model, cache_config={"budget": args.budget})
    history = ov_kvcrush.ChatHistory()
    history.append({"role": "system", "content": args.system})
    while True:
        try:
            question = input("You: ")
        except EOFError:
            break
        if not question:
            break
        history.append({"role": "user", "content": question})
        results = pipe.generate(history, max_new_tokens=args.max_new_tokens, do_sample=False)
        history.append({"role": "assistant", "content": results.texts[0]})
        metrics = results.perf_metrics
        print(f"Model: {results.texts[0]}")
        print(f"({metrics.num_input_tokens} tokens in, {metrics.num_reused_tokens} of them reused)")


if __name__ == "__main__":
    main()

"""The likeliest answer to one or more prompts, with what it took.

    python samples/greedy_generation.py                                    # the default model
    python samples/greedy_generation.py ./my-model --prompt "Name a river." --prompt "Name a mountain."

Several prompts run together in one batch; each gets the answer that it would get alone.
"""

import argparse

import ov_kvcrush


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of an exported model; the default model if omitted")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--budget", help="bytes of the KV cache over those of bf16, as 1/6; all stays if omitted")
    args = parser.parse_args()
    prompts = args.prompt or ["What is the capital of France? Answer in one sentence."]

    pipe = ov_kvcrush.LLMPipeline(args.model, cache_config={"budget": args.budget})
    results = pipe.generate(prompts, max_new_tokens=args.max_new_tokens, do_sample=False)

    for prompt, text in zip(prompts, results.texts, strict=True):
        print(f"Prompt: {prompt}\nAnswer: {text}\n")
    metrics = results.perf_metrics
    print(f"{metrics.num_input_tokens} tokens in, {metrics.num_generated_tokens} tokens out")
    print(f"first token after {metrics.get_ttft().mean:.0f} ms, then one every {metrics.get_tpot().mean:.1f} ms")


if __name__ == "__main__":
    main()

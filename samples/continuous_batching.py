"""Requests that arrive while others run.

    python samples/continuous_batching.py                         # the default model
    python samples/continuous_batching.py ./my-model --every 3

Each step moves all running requests on by one token; a request that arrives joins them at the next step.
"""

import argparse

from ov_kvcrush import ContinuousBatchingPipeline, GenerationConfig, GenerationStatus

PROMPTS = ["The capital of France is", "The sea is", "Two plus two is", "Once upon a time there was"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of an exported model; the default model if omitted")
    parser.add_argument("--every", type=int, default=5, help="steps between two requests")
    args = parser.parse_args()

    pipe = ContinuousBatchingPipeline(args.model)
    tokenizer = pipe.get_tokenizer()
    waiting, running, step = list(enumerate(PROMPTS)), {}, 0
    while waiting or pipe.has_non_finished_requests():
        if waiting and step % max(args.every, 1) == 0:
            request_id, prompt = waiting.pop(0)
            running[request_id] = pipe.add_request(request_id, prompt, GenerationConfig(max_new_tokens=12))
            print(f"step {step}: request {request_id} arrives, {len(running)} are running")
        pipe.step()
        step += 1
        for request_id in [i for i, handle in running.items() if handle.get_status() != GenerationStatus.RUNNING]:
            text = tokenizer.decode(running.pop(request_id).read_all()[0].generated_ids)
            print(f"step {step}: request {request_id} ends: {PROMPTS[request_id] + text!r}")
    print(f"{len(PROMPTS)} requests in {step} steps; blocks in use: {pipe.get_metrics().num_used_blocks}")


if __name__ == "__main__":
    main()

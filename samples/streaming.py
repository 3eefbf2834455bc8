"""Text that appears while it is generated, and a streamer that decides when it is enough.

    python samples/streaming.py                                  # the default model
    python samples/streaming.py ./my-model --sentences 2

A streamer is any function of a piece of text; its answer says whether to go on.
"""

import argparse

from ov_kvcrush import LLMPipeline, StreamingStatus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of an exported model; the default model if omitted")
    parser.add_argument("--prompt", default="Tell me about the sea.")
    parser.add_argument("--sentences", type=int, default=3, help="stop after so many full stops")
    args = parser.parse_args()
    num_full_stops = 0

    def show(text: str) -> StreamingStatus:
        nonlocal num_full_stops
        print(text, end="", flush=True)
        num_full_stops += text.count(".")
        return StreamingStatus.STOP if num_full_stops >= args.sentences else StreamingStatus.RUNNING

    pipe = LLMPipeline(args.model)
    answer = pipe.generate(args.prompt, streamer=show, max_new_tokens=200, do_sample=False)
    print(f"\n\nThe answer that `generate` returns has {len(answer)} characters.")


if __name__ == "__main__":
    main()

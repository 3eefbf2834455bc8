"""What `ov_kvcrush-bench --help` says before its options."""

# Paragraphs by blank lines only: the help keeps every line break.
HELP = """\
Measure speed and memory of the engine on this machine, alone or beside openvino_genai.

MODEL is the folder of an exported model or a GGUF file, which is converted once; left out, it is SmolLM2-135M-Instruct.

Requests of random token ids are added at once and run to their end. \
All engines get the same prompts, chunk size and OpenVINO properties, ignore the end of sequence, \
and reuse nothing from earlier runs. For each context and batch, each engine runs in a process of its own; \
after a warm-up they take turns, run by run.

[bold]Columns[/bold] (medians over the runs)

[bold]keys/values[/bold]: types of what is cached. An engine that has not got the types asked for keeps its default, \
and is marked.

[bold]TTFT[/bold]: from adding the requests to the first token of a request; mean over the requests.

[bold]TPOT[/bold]: (time of the last token - time of the first) / (tokens - 1) of a request; mean over the requests.

[bold]tokens/s[/bold]: tokens generated after every request had its first, per second from then to the end: decoding \
alone. The file also has total_tokens_per_s, prompts included.

[bold]KV[/bold]: peak of the cache, as the engine tells it, and its size per token of the texts, kept or not, while \
all requests decode: of openvino_genai what it allocated, of ours the bytes in use. Blocks that prompts are read on \
are not part of it.

[bold]peak[/bold], [bold]growth[/bold]: largest resident memory of the engine's process, and how much more that is \
than right after loading: cache, blocks of prompts, activations.

[bold]kept[/bold]: tokens of the prompt that a head keeps in the cache, on average, when the prompt is read. Ours are \
counted; of openvino_genai they are what it was told to keep.

[bold]overhead[/bold]: time per step outside of the inference itself while all requests decode; of our engine only.

[bold]policy[/bold]: time of all work for --policy (scores, choices, adopting and moving what was chosen), as a share \
of the whole run, prompts included; of our engine only. It is part of the overhead.

[bold]--against genai-policy[/bold] lets openvino_genai keep as many tokens as our policy, rounded down to whole \
blocks of 32, representatives included on both sides: with its KVCrush if ours is KVCrush, else with its plain eviction.

[bold]--against llama.cpp[/bold] (pip install 'ov-kvcrush\\[peers]') runs the GGUF file itself beside our \
conversion of it: the same prompts and chunks, as many threads as OpenVINO takes, llama.cpp's default cache of f16, \
the likeliest token each time. One request at a time. \
A process holds some 80 MiB of Python and libraries, with every engine.

[bold]--scaling[/bold] is --context with one more engine: ours beside ours with --recall-tokens, and genai.

[bold]--attention[/bold] measures one decode step of the model's attention layers alone: OpenVINO's PagedAttention on \
u8, and ours. No weights are read; both caches hold the same random tokens. They take turns in one process, and before \
each step a large array is read: that leaves no cache warm, and tells how fast this machine reads memory. \
[bold]bound[/bold] is the time in which our bytes could be read at that speed.

[bold]--traffic[/bold] measures what others wait while a prompt of --context tokens is read: the time between two \
tokens of --batch answers that are being written (p50, p95, p99 and the longest), and the first token of a prompt of \
16 tokens that comes right behind the long one, beside its time alone.

[bold]--plot[/bold] draws the cost of a token over cached tokens, requests and threads, wherever several were \
measured: now, or earlier with --json.

[bold]Examples[/bold]

  ov_kvcrush-bench    [dim]# the default model, 1024 tokens[/dim]

  ov_kvcrush-bench my-model --context 1024,4096 --batch 1,8 --against genai

  ov_kvcrush-bench my-model --context 16384 --key-precision u4 --value-precision u2 --json out.json

  ov_kvcrush-bench my-model.gguf --context 128,4096 --against llama.cpp

  ov_kvcrush-bench my-model --scaling 512,2048,8192,32768 --recall-tokens 2048 --plot scaling.png --json scaling.json

  ov_kvcrush-bench my-model --context 8192 --policy kvcrush --kept 0.25 --against genai-policy

  ov_kvcrush-bench my-model --traffic --context 5000 --batch 4 --against genai

  ov_kvcrush-bench my-model --runs 5 --property INFERENCE_NUM_THREADS=2

  ov_kvcrush-bench my-model --attention --context 512,4096,32768 --threads 1,2 --json attention.json

  ov_kvcrush-bench --plot cost.png --from attention.json --from out.json

Close other programs first, and believe no single run: the ratios show medians, best runs and pairs side by side.
"""

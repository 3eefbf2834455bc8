"""What `ov_kvcrush-chat --help` says around its options."""

HELP = """
Chat with a language model on OpenVINO.

MODEL is a folder written by ov_kvcrush-export; without it the default model answers.

At a terminal this is a conversation. Given --prompt, or text piped to standard input, it is one answer: \
the answer goes to standard output, everything else to standard error.

--context FILE gives a long text that questions are about. It is read and compressed once, before the first question \
is known, and answers go on from what is kept of it; --save-context writes that, and a written file takes the place of \
the text in another run of the same model.

While chatting, /help shows the commands. Ctrl-C stops the answer, not the program; Ctrl-D or /quit leaves.
"""

EXAMPLES = """
[bold]Examples[/bold]

[dim]# Chat with the default model, SmolLM2-135M-Instruct (converted once, at the first start)[/dim]

ov_kvcrush-chat

[dim]# One answer; what it took is shown, and the file gets nothing but the answer[/dim]

ov_kvcrush-chat --stats --prompt "What is the capital of France?" > answer.txt

[dim]# A question about a text, which is put below the prompt[/dim]

ov_kvcrush-chat --prompt "Summarise this in one sentence:" < notes.txt

[dim]# A model written by ov_kvcrush-export; sampled, repeatable by its seed[/dim]

ov_kvcrush-chat ./my-model --temperature 0.7 --top-p 0.9 --seed 1

[dim]# A long conversation in little memory: keys in 4 bits, values in 2, at most 64 MiB of them[/dim]

ov_kvcrush-chat --stats --key-precision u4 --value-precision u2 --max-kv-mb 64

[dim]# A question about a long text, of which 512 tokens stay in memory; shows which[/dim]

ov_kvcrush-chat --kept-tokens 512 --show-kept --prompt "Who is the thief?" < story.txt

[dim]# Another policy with a setting of its own; a tenth stays of a chat of more than 2048 tokens[/dim]

ov_kvcrush-chat --policy snapkv --policy-option window=64 --kept 0.1 --min-tokens 2048

[dim]# A manual, compressed to a sixth of its bytes and asked; written as well, to be asked again unread[/dim]

ov_kvcrush-chat --context manual.txt --save-context manual.kvc --prompt "How is the filter changed?"

[dim]# A conversation about it, at once; /save FILE writes what was said, too[/dim]

ov_kvcrush-chat --context manual.kvc

[dim]# For a program[/dim]

echo "Name three rivers." | ov_kvcrush-chat --json

[bold]Policies[/bold]: what stays in the KV cache of a long text ([bold]--policy help[/bold] has their settings)

"""

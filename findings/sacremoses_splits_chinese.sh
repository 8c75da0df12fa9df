#!/usr/bin/env bash
# sacremoses 0.2.0 and Moses' tokenizer.perl disagree on words in Chinese, Korean and Hindi letters.
#
# Expected: sacremoses is a port of tokenizer.perl and gives the same tokens.
# Seen: the Perl script, whose classes are those of Unicode, keeps the Chinese and the Korean word
# whole and separates the combining signs of the Hindi one; sacremoses, which has lists of characters,
# cuts Chinese and Korean into single characters and keeps the Hindi word whole.
# Why it matters: training text of TED and Common Crawl has such words in its English and German
# lines. BPE codes, dictionaries, word counts and tokenised BLEU of a corpus prepared with sacremoses
# differ from the published ones, which were prepared with the Perl scripts.
#
# Needs Perl. Takes a minute.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
# mosestokenizer is taken for the Perl script that it carries.
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install sacremoses==0.2.0 \
    mosestokenizer==1.2.1
perl_script=$(find "$folder/venv" -name tokenizer-v1.1.perl -o -name tokenizer.perl | head -n 1)
words='中文
한국
नमस्ते'
by_perl=$(perl "$perl_script" -q -l en <<< "$words")
by_sacremoses=$("$folder/venv/bin/python" -c '
import sys
from sacremoses import MosesTokenizer
tokenizer = MosesTokenizer("en")
for line in sys.stdin.buffer.read().decode().split():
    sys.stdout.buffer.write((tokenizer.tokenize(line, return_str=True) + "\n").encode())
' <<< "$words")
echo "sacremoses 0.2.0, $(basename "$perl_script") of mosestokenizer 1.2.1"
paste <(echo "$words") <(echo "$by_perl") <(echo "$by_sacremoses")
[ "$(head -n 2 <<< "$by_perl")" = "$(head -n 2 <<< "$words")" ]
[ "$(head -n 2 <<< "$by_sacremoses")" = '中 文
한 국' ]
[ "$(tail -n 1 <<< "$by_sacremoses")" = 'नमस्ते' ]
[ "$(tail -n 1 <<< "$by_perl")" != 'नमस्ते' ]

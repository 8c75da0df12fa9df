#!/usr/bin/env bash
# Installs the programs that some tests need, where Debian's packages can be installed: SLURM for
# tests/sweeps/, Chromium for the tests of the HTML report. Without them those tests are skipped and
# say so. Never fails: says why it did nothing.
set -u
packages=(slurm-wlm munge chromium chromium-driver)

if [ "$(id -u)" -ne 0 ]; then
    echo "Debian packages not installed (needs root): ${packages[*]}"
elif ! command -v apt-get >/dev/null; then
    echo "Debian packages not installed (no apt-get here): ${packages[*]}"
elif dpkg-query --show --showformat='${Status}\n' "${packages[@]}" 2>/dev/null |
    awk '$0 == "install ok installed" { n++ } END { exit n != '"${#packages[@]}"' }'; then
    echo "Debian packages there already: ${packages[*]}"
elif log=$( (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes \
    --no-install-recommends "${packages[@]}") 2>&1); then
    echo "Debian packages installed: ${packages[*]}"
else
    echo "Debian packages not installed, apt-get failed: $(tail -n 1 <<<"$log")"
fi
exit 0

#!/usr/bin/env bash
# Writes the foreign parts of the page at /: markdown-it as its authors publish it, byte for byte, and the licences of everything in
# its file (its package.json names what is bundled). Needs npm. To take another version, change these lines and run it.
set -euo pipefail
cd "$(dirname "$0")"
main=markdown-it@15.0.3
bundled=(entities@8.1.0 linkify-it@6.1.0 mdurl@2.1.0 punycode.js@2.3.1 uc.micro@3.0.0)
sha256=391f2aa638e75e6c7859d0a5c5650ef0956722a45998f17e05b83bc655778e1e

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unpack() { # NAME@VERSION: its published files, under $work/package
    rm -rf "$work/package"
    tar -xzf "$work/$(npm pack --silent --pack-destination "$work" "$1")" -C "$work"
}
licence() { printf '%s\n\n%s\n\n\n' "=== $1" "$(cat "$work"/package/LICENSE*)"; }

unpack "$main"
echo "$sha256  $work/package/dist/browser/markdown-it.umd.min.js" | sha256sum --check --quiet
cp "$work/package/dist/browser/markdown-it.umd.min.js" .
licence "$main" >"$work/licences"
for one in "${bundled[@]}"; do
    unpack "$one"
    licence "$one" >>"$work/licences"
done
mv "$work/licences" LICENSES.txt

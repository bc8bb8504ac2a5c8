"""The pages' style sheets: readable at 400 pixels and at 1200, and on paper."""

CSS = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d9dee3; --paper: #ffffff; --tint: #f5f7f9;
  --yes: #1a6b3c; --no: #a8322a; --open: #7a5700; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16.5px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 72px; }
p, ul, dl.plain { max-width: 46em; }
header { border-bottom: 1px solid var(--line); padding-bottom: 20px; margin-bottom: 8px; }
.kind { margin: 0 0 10px; color: var(--soft); font-size: 14.5px; }
h1 { margin: 0 0 14px; max-width: 30em; font-size: clamp(23px, 3.6vw, 33px); line-height: 1.25; letter-spacing: -0.01em; text-wrap: balance; }
h2 { margin: 52px 0 10px; font-size: 21px; line-height: 1.3; }
h3 { margin: 28px 0 6px; font-size: 16.5px; }
.lead { font-size: 18px; margin: 0; }
.notice { margin: 18px 0 0; padding: 10px 14px; background: #fff7e0; border-left: 4px solid #d9a400; }
.claims { list-style: none; margin: 14px 0 0; padding: 0; max-width: none; }
.claims li { display: grid; grid-template-columns: 7.2em 1fr; gap: 2px 14px; padding: 9px 0; border-bottom: 1px solid var(--line); }
.claims .mark { font-weight: 650; white-space: nowrap; }
.claims small { display: block; }
.yes .mark { color: var(--yes); } .no .mark { color: var(--no); } .undecided .mark { color: var(--open); }
small, .small { color: var(--soft); font-size: 14px; line-height: 1.45; }
.scroll { overflow-x: auto; margin: 14px 0 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: 8px; color: var(--soft); font-size: 14px; line-height: 1.45; }
th, td { padding: 8px 12px; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; line-height: 1.35; }
th { font-weight: 600; }
thead th { color: var(--soft); font-size: 14px; vertical-align: bottom; border-bottom: 1.5px solid #aab2ba; }
th:first-child, td:first-child { text-align: left; padding-left: 2px; }
td small, tbody th small { display: block; white-space: nowrap; font-size: 12.5px; font-weight: 400; }
tbody tr.own { background: var(--tint); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 8px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 22px 28px; margin: 16px 0 6px; }
figure { margin: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figure.single { max-width: 640px; margin: 16px 0 6px; }
figcaption { color: var(--soft); font-size: 14px; line-height: 1.45; margin-top: 4px; }
dl.facts { display: grid; grid-template-columns: minmax(9em, 13em) 1fr; margin: 14px 0; }
dl.facts dt { color: var(--soft); } dl.facts dd { margin: 0; }
dl.facts dt, dl.facts dd { padding: 6px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--tint); padding: 12px 14px; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 4px; }
details summary { cursor: pointer; }
@media (max-width: 640px) {
  body { font-size: 16px; } main { padding: 24px 16px 48px; } h2 { margin-top: 40px; }
  .claims li { grid-template-columns: 1fr; }
  th, td { padding: 7px 4px; font-size: 14px; } thead th { font-size: 12px; hyphens: auto; }
  td small { font-size: 11px; white-space: normal; } .key { width: 9px; height: 9px; margin-right: 4px; }
  table.dense { table-layout: fixed; } .dense th:first-child { width: 4.3em; font-size: 13px; }
  .dense thead th { font-size: 11px; padding: 7px 2px; } .dense th, .dense td { padding: 7px 3px; }
  dl.facts { grid-template-columns: 1fr; } dl.facts dt { border: 0; padding: 8px 0 0; } dl.facts dd { padding-top: 0; }
}
@media print {
  body { font-size: 10.5pt; } main { max-width: none; padding: 0; } h2 { margin-top: 22pt; break-after: avoid; }
  .pictures { grid-template-columns: 1fr 1fr; gap: 10pt; } tr, li, pre { break-inside: avoid; } .scroll { overflow: visible; }
}
"""

#: of pages that tell runs or models apart by colour, on light and on dark paper
RUNS_CSS = """
:root { --run0: #0072b2; --run1: #d55e00; --run2: #009e73; --run3: #cc79a7; --run4: #8a8a00; --run5: #56b4e9; }
td.words, table:has(td.words) th { text-align: left; }
@media (max-width: 640px) {
  table.dense th:first-child { width: 7.5em; overflow-wrap: anywhere; }
  table:not(.dense) :is(th:has(.key), td.words) { min-width: 5.6em; overflow-wrap: anywhere; }
}
@media (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e6e8eb; --soft: #9aa4af; --line: #343b43; --paper: #14171a; --tint: #1d2227;
    --yes: #6fcf97; --no: #ff7b72; --open: #e3b341; }
  :root { --run0: #4da6e0; --run1: #ff8a3d; --run2: #2fd3a3; --run3: #e79bc4; --run4: #d6d24a; --run5: #a5dcff; }
  thead th { border-bottom-color: #59636e; }
}
"""

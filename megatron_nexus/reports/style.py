"""The page's style: light and dark as the reader's device asks, one column on a phone."""

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --text: #1f1f1e; --soft: #66645f; --rule: #dddbd5;
  --box: #f3f2ee; --note: #fdf3d9; --c0: #2a78d6; --c1: #eb6834; --c2: #1a9c6b; --c3: #4a3aa7; --c4: #c98500;
  --c5: #d0417f; --c6: #008300; --c7: #8a5a2b; }
@media (prefers-color-scheme: dark) {
  :root { --page: #1a1a19; --text: #eceae4; --soft: #a6a49c; --rule: #3b3a37; --box: #242422; --note: #3a3118;
    --c0: #5598e7; --c1: #ee7a4c; --c2: #2fb183; --c3: #9d94ea; --c4: #d99a1e; --c5: #e26a9c; --c6: #4fae4f;
    --c7: #c08f5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 16px; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } p { margin: .4rem 0; max-width: 75ch; }
.soft { color: var(--soft); font-size: .9rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 12px; }
figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; font-family: inherit; }
svg text.title { fill: var(--text); font-size: 12.5px; font-weight: 600; }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--soft); stroke-width: 1; }
.seam { stroke: var(--text); stroke-width: 1; stroke-dasharray: 2 3; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 6 4; } .dot { fill: var(--c); stroke: var(--page); stroke-width: 1.5; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .9rem; max-width: none; }
.key { display: inline-block; width: 18px; border-top: 3px solid var(--c); margin-right: 6px;
  vertical-align: middle; } .key.dashed { border-top-style: dashed; }
.wide { overflow-x: auto; margin: .4rem 0; } table { border-collapse: collapse; font-size: .88rem; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; overflow-wrap: normal; }
th { color: var(--soft); font-weight: 600; } td.number, td.none { font-variant-numeric: tabular-nums; }
th, td { white-space: nowrap; }
.notes { background: var(--note); border-radius: 6px; padding: 8px 12px 8px 28px; margin: .6rem 0; }
pre { background: var(--box); border-radius: 6px; padding: 8px 12px; overflow-x: auto; font-size: .85rem;
  white-space: pre-wrap; } summary { cursor: pointer; color: var(--soft); margin: .4rem 0; }
ul.tree, ul.tree ul { list-style: none; padding-left: 1.1rem; border-left: 2px solid var(--rule); }
ul.tree { padding-left: .6rem; } ul.tree li { margin: .3rem 0; }
"""

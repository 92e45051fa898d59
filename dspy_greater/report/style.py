"""The look of a report: one column, system fonts, two colours that a colour-blind reader tells apart."""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--panel:#f6f7f8;--ink:#1a1d21;--soft:#59616b;--rule:#dfe3e7;
--new:#0b5cad;--new-bg:#e3effb;--old:#9a3c00;--old-bg:#fdeee0;--p0:#9db4cc;--p1:#0b5cad;--p2:#d98032}
@media(prefers-color-scheme:dark){:root{--paper:#121417;--panel:#1a1d21;--ink:#e6e8eb;--soft:#9ba4af;--rule:#2d3238;
--new:#7db8f5;--new-bg:#13304d;--old:#f5a868;--old-bg:#43260f;--p0:#5f7387;--p1:#7db8f5;--p2:#f0a25a}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);line-height:1.5;font-size:16px;overflow-wrap:anywhere;
font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif}
main{max-width:68rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1,h2,h3{line-height:1.25;font-weight:600}
h1{font-size:1.0625rem;margin:0}
h2{font-size:1.5rem;margin:3.5rem 0 1rem;padding-top:1.5rem;border-top:1px solid var(--rule)}
h3{font-size:1rem;margin:2.25rem 0 .6rem}
p{margin:.5rem 0;max-width:44rem}
.soft,.note{color:var(--soft)}
h2 .soft,h3 .soft{font-weight:400}
.note{font-size:.875rem}
.text,code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.8125rem}
.text{white-space:pre-wrap;unicode-bidi:isolate;margin:0;max-width:none;line-height:1.55}
header p{margin:.15rem 0}
.headline{display:flex;flex-wrap:wrap;align-items:baseline;gap:.25rem 1rem;margin:1.5rem 0 .25rem;
font-variant-numeric:tabular-nums}
.headline b{font-size:3.25rem;line-height:1.1;font-weight:600;letter-spacing:-.02em}
.headline .was{font-size:2rem;color:var(--soft);letter-spacing:-.01em}
.headline .arrow{font-size:1.75rem;color:var(--soft)}
.stats{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.9rem 1.5rem;margin:1.25rem 0;
font-variant-numeric:tabular-nums}
.stats dt{color:var(--soft);font-size:.8125rem}
.stats dd{margin:0;font-size:1.0625rem}
.stats small{color:var(--soft);font-size:.8125rem;display:block}
.diff{font-size:1.1875rem;line-height:1.65;white-space:pre-wrap;max-width:none;
padding:1rem 1.25rem;background:var(--panel);border-radius:.5rem;margin:1rem 0}
del,ins{border-radius:.2rem;padding:.05em .15em;-webkit-box-decoration-break:clone;box-decoration-break:clone}
del{color:var(--old);background:var(--old-bg);text-decoration:line-through;text-decoration-thickness:1px}
ins{color:var(--new);background:var(--new-bg);text-decoration:underline;text-decoration-thickness:1px;
text-underline-offset:.2em}
del+ins{margin-left:.15em}
details{border-top:1px solid var(--rule)}
details:last-of-type{border-bottom:1px solid var(--rule)}
details.more>summary{color:var(--soft)}
summary{cursor:pointer;padding:.55rem 0;display:flex;gap:.2rem .75rem;align-items:baseline;list-style:none}
summary::-webkit-details-marker{display:none}
summary::before{content:"+";color:var(--soft);width:.8rem;flex:none;font-family:ui-monospace,monospace}
details[open]>summary::before{content:"\\2212"}
summary .rest{min-width:0;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;color:var(--soft)}
summary>*{flex:none}summary>.rest{flex:1 1 0}
summary:focus-visible,a:focus-visible{outline:2px solid var(--new);outline-offset:2px}
.body{padding:.25rem 0 1.25rem 1.55rem}
.tag{font-size:.8125rem;font-weight:600;min-width:3.4rem}
.fixed,.better-text{color:var(--new)}.broken,.worse-text{color:var(--old)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr));gap:1rem 1.5rem;margin-top:.75rem}
.pair>div{min-width:0;border-left:3px solid var(--rule);padding-left:.9rem}
.pair>div.won{border-color:var(--new)}
.field{margin:.5rem 0;min-width:0}
.field>span{display:block;font-size:.8125rem;color:var(--soft)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));
gap:1.25rem 2.5rem;margin:1rem 0}
figure{margin:0;min-width:0;max-width:33rem}
figcaption{font-size:.875rem;margin-bottom:.4rem;font-weight:600}
figure .note{font-size:.8125rem;margin:.1rem 0 0}
svg.figure{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
svg text.name,svg text.amount{font-size:12px}svg text.amount{fill:var(--ink)}
svg .grid{stroke:var(--rule);stroke-width:1}svg .axis,svg .zero{stroke:var(--soft);stroke-width:1}
svg .zero{stroke-dasharray:2 3}
svg .line{fill:none;stroke:var(--new);stroke-width:2;stroke-linejoin:round}
svg .accepted{fill:var(--paper);stroke:var(--new);stroke-width:2}
svg .better{fill:var(--new)}svg .worse{fill:none;stroke:var(--old);stroke-width:1.75}svg .even{fill:var(--soft)}
svg .phase0{fill:var(--p0)}svg .phase1{fill:var(--p1)}svg .phase2{fill:var(--p2)}
.scroll{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
th{font-weight:400;color:var(--soft);text-align:left;font-size:.8125rem}
th,td{padding:.35rem .9rem .35rem 0;border-bottom:1px solid var(--rule);vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap}
td:first-child:not(.n){min-width:6rem}
td.wide{min-width:9rem}
tr.chosen td{background:var(--new-bg)}
tr.chosen td:first-child{box-shadow:inset 3px 0 var(--new)}
td:first-child,th:first-child{padding-left:.6rem}
.key{display:inline-block;width:.7rem;height:.7rem;border-radius:.15rem;margin-right:.35rem}
.phase0{background:var(--p0)}.phase1{background:var(--p1)}.phase2{background:var(--p2)}
.keys{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.875rem;color:var(--soft);margin:0 0 .75rem}
dl.settings{display:grid;grid-template-columns:minmax(9rem,auto) 1fr;gap:.2rem 1.5rem;font-size:.875rem;margin:.25rem 0}
dl.settings dt{color:var(--soft)}dl.settings dd{margin:0}
footer{margin-top:3.5rem;padding-top:1rem;border-top:1px solid var(--rule);color:var(--soft);font-size:.8125rem}
@media(max-width:34rem){main{padding:1.5rem 1rem 3rem}.headline b{font-size:2.5rem}.headline .was{font-size:1.5rem}
.diff{font-size:1.0625rem;padding:.8rem .9rem}.body{padding-left:0}dl.settings{grid-template-columns:1fr}
dl.settings dd{margin-bottom:.4rem}
.edits tr{display:grid;grid-template-columns:2.6rem 1fr 3.5rem 4.5rem;border-bottom:1px solid var(--rule)}
.edits td,.edits th{border:0}
.edits td:last-child{grid-column:1/-1;padding-left:2.6rem}.edits th:last-child{display:none}
h2{font-size:1.25rem;margin-top:2.5rem}}
@media print{details>*{display:block}main{max-width:none}}
"""

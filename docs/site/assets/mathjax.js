// Formulas: between dollars in notebooks, between arithmatex's brackets in pages.
window.MathJax = {
  tex: { inlineMath: [["$", "$"], ["\\(", "\\)"]], displayMath: [["$$", "$$"], ["\\[", "\\]"]] },
  options: { ignoreHtmlClass: "md-nav|md-header|highlight", enableMenu: false },
};

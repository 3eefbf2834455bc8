// Which parts of a text the cache keeps: a strip, and the text itself in the same colours.

const CELLS = 160;
const MEANINGS = ["no head", "≤ 1/4", "≤ 1/2", "≤ 3/4", "more"];

// The level of a share of heads, 0 to 4: 0 for none.
function level(share) {
  return share <= 0 ? 0 : Math.min(4, 1 + Math.floor(share * 4 - 1e-9));
}

// texts, kept: of each token, its text and the share of all KV heads that hold it, 0 to 1.
export function showKeptMap({ texts, kept }, strip, legend, text) {
  const shares = cells(kept);
  strip.replaceChildren(...shares.map((share) => coloured("i", level(share))));
  const held = shares.reduce((sum, share) => sum + share, 0) / Math.max(1, shares.length);
  strip.setAttribute("aria-label", `Of the document's tokens a head keeps ${Math.round(100 * held)} % on average.`);
  legend.replaceChildren(
    ...MEANINGS.map((meaning, of) => {
      const item = document.createElement("li");
      item.append(coloured("i", of), meaning);
      return item;
    }),
  );
  text.replaceChildren(...runs(texts, kept));
}

function coloured(tag, of) {
  const element = document.createElement(tag);
  element.className = `kept-${of}`;
  return element;
}

// The mean share of each cell of the strip.
function cells(kept) {
  const number = Math.min(CELLS, kept.length);
  return Array.from({ length: number }, (_, i) => {
    const part = kept.slice(Math.floor((i * kept.length) / number), Math.floor(((i + 1) * kept.length) / number));
    return part.reduce((sum, share) => sum + share, 0) / part.length;
  });
}

// Spans of neighbours of the same level.
function runs(texts, kept) {
  const spans = [];
  let last = -1;
  texts.forEach((text, i) => {
    if (level(kept[i]) !== last) {
      last = level(kept[i]);
      spans.push(coloured("span", last));
    }
    spans[spans.length - 1].append(text);
  });
  return spans;
}

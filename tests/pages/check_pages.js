// Opens each of `pages` (name to HTML) at each of `widths` and returns what is wrong with it, a line each.
async function checkPages(pages, widths) {
  const found = [];
  for (const [name, html] of Object.entries(pages))
    for (const width of widths) {
      const frame = document.createElement("iframe");
      frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
      const loaded = new Promise(done => frame.addEventListener("load", done));
      // Before any script of the page: what goes wrong is kept.
      const hook = "<script>window.wrong = []; addEventListener('error', e => wrong.push(e.message || 'not loaded'), true);"
        + "for (const kind of ['error', 'warn']) console[kind] = (...said) => wrong.push(kind + ': ' + said.join(' '));<\/script>";
      frame.srcdoc = html.replace(/<meta charset="utf-8">/, match => match + hook);
      document.body.append(frame);
      await loaded;
      const say = what => found.push(`${name} at ${width}: ${what}`);
      const page = frame.contentWindow;
      if (!page.wrong) say("found no hook");
      checkLayout(page, width, say);
      checkPictures(page, say);
      checkTables(page, say);
      (page.wrong || []).forEach(what => say(`console: ${what}`));
      frame.remove();
    }
  return found;
}

const scrolls = element => ["auto", "scroll"].includes(element.ownerDocument.defaultView.getComputedStyle(element).overflowX);

function shown(element) {
  const text = element.textContent.trim().replace(/\s+/g, " ").slice(0, 40);
  return `${element.tagName.toLowerCase()} "${text}"`;
}

// Nothing is wider than its place, nothing lies over anything else.
function checkLayout(page, width, say) {
  const blocks = [...page.document.querySelectorAll("h1, h2, h3, p, th, td, li, pre, img, summary")].filter(
    element => element.getClientRects().length);
  if (page.document.documentElement.scrollWidth > width) say(`is ${page.document.documentElement.scrollWidth} wide`);
  for (const block of blocks) {
    if (block.scrollWidth > block.clientWidth + 1 && block.clientWidth && !scrolls(block)) say(`${shown(block)} is cut`);
    // Long words may be broken, but not at every letter.
    if (/^T[DH]$/.test(block.tagName) && block.clientWidth < 70 && block.textContent.trim().length > 12) say(`${shown(block)} is squeezed`);
    let holder = block.parentElement;
    while (holder && !scrolls(holder)) holder = holder.parentElement;
    const box = block.getBoundingClientRect();
    if (!holder && (box.right > width + 1 || box.left < -1)) say(`${shown(block)} reaches beyond the page`);
  }
  for (const [place, one] of blocks.entries())
    for (const other of blocks.slice(place + 1)) {
      if (one.contains(other) || other.contains(one)) continue;
      const a = one.getBoundingClientRect(), b = other.getBoundingClientRect();
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > 1) say(`${shown(one)} and ${shown(other)} overlap`);
    }
}

// Every picture is there, and says what it shows to those who cannot see it.
function checkPictures(page, say) {
  for (const picture of page.document.images) {
    if (!picture.complete || !picture.naturalWidth) say("a picture is not there");
    if (picture.alt.split(/\s+/).length < 4) say(`a picture says no more than "${picture.alt}"`);
  }
}

// A click on a head sorts by its column, another the other way round, and Enter does the same.
function checkTables(page, say) {
  for (const table of page.document.querySelectorAll("table.sortable"))
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const isNumber = head.classList.contains("number");
      const values = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent.trim())
        .map(text => isNumber ? parseFloat(text.replaceAll(",", "")) : text).filter(value => !Number.isNaN(value));
      for (const [act, direction] of [
        [() => head.click(), "ascending"],
        [() => head.dispatchEvent(new page.KeyboardEvent("keydown", { key: "Enter" })), "descending"],
      ]) {
        act();
        const sign = direction === "ascending" ? 1 : -1;
        const isSorted = values().every((value, row, all) => !row || (value >= all[row - 1] ? 1 : -1) * sign > 0 || value === all[row - 1]);
        if (!isSorted || head.getAttribute("aria-sort") !== direction) say(`${shown(head)} is not ${direction}`);
      }
      if (head.tabIndex !== 0) say(`${shown(head)} cannot be reached by the keyboard`);
    });
}

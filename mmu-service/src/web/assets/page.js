'use strict';

// The page asks once a second, for as long as somebody looks at it. Each answer is bounded by the
// service, whatever the size of the VM.
const EVERY_MS = 1000;
const OVERVIEW_CELLS = 2048;
const PAGE = 4096n;
const LARGE = 2n * 1024n * 1024n;
const KEPT_BATCHES = 300;
const SHOWN_BATCHES = 80;
const STATES = ['none', 'free', 'shared', 'private', 'pending', 'blocked', 'frozen', 'mixed'];
const NAMES = {
  none: 'no memory slot', free: 'not mapped', shared: 'shared', private: 'private',
  pending: 'pending', blocked: 'blocked', frozen: 'frozen', mixed: 'mixed',
};
const MEANING = {
  none: 'no memory slot here', free: 'a slot, and nothing mapped', shared: 'mapped in the direct root',
  private: 'mapped in the mirror root', pending: 'private, and not accepted by the guest',
  blocked: 'blocked in the module', frozen: 'a change is in flight',
  mixed: 'shared and private pages in one cell',
};
// Leaves that only look.
const LOOKS = new Set(['TDH.MEM.SEPT.RD', 'TDH.PHYMEM.PAGE.RDMD', 'TDH.MNG.RD']);

const $ = (id) => document.getElementById(id);
const el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'class') node.className = value; else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
};
const hex = (value) => '0x' + value.toString(16);
const count = (value) => Number(value).toLocaleString('en');

function bytes(value) {
  let size = BigInt(value);
  for (const unit of ['B', 'KiB', 'MiB', 'GiB']) {
    if (size < 1024n || size % 1024n !== 0n && size < 10240n) return `${count(size)} ${unit}`;
    size /= 1024n;
  }
  return `${count(size)} TiB`;
}

function micros(us) {
  if (us < 1000) return `${us} µs`;
  const short = (value) => String(Number(value.toFixed(value < 10 ? 1 : 0)));
  return us < 1e6 ? `${short(us / 1000)} ms` : `${short(us / 1e6)} s`;
}

const state = {
  vm: null, page: null, jaeger: '', moduleUp: false, views: [], cells: [], selected: 0, columns: 64, cellPx: 10,
  last: 0, batches: [], paused: false, marks: {}, busy: false,
};

// ---- talking to the service ----

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body),
  };
  const response = await fetch(path, options);
  let answer = null;
  try { answer = await response.json(); } catch { /* said below */ }
  if (!response.ok) {
    const said = answer && answer.error;
    const error = new Error(said ? said.message : `HTTP ${response.status}`);
    error.reason = said ? said.reason : '';
    throw error;
  }
  return answer;
}

async function refresh() {
  if (state.busy) return;
  state.busy = true;
  try {
    const overview = await ask('api/overview');
    showOverview(overview);
    if (!state.paused) showBatches(await ask(`api/batches?after=${state.last}&limit=200`));
    if (state.vm !== null) await refreshVm();
    document.body.dataset.fresh = String(Number(document.body.dataset.fresh || 0) + 1);
  } catch (error) {
    const module = $('module');
    module.className = 'module down';
    module.textContent = error.reason ? error.message : 'The service does not answer';
  } finally {
    state.busy = false;
  }
}

async function refreshVm() {
  const vm = state.vm;
  let page;
  try {
    page = await ask(`api/vms/${vm}`);
  } catch (error) {
    if (error.reason !== 'NOT_FOUND') throw error;
    choose(null);
    return;
  }
  if (vm !== state.vm) return;
  showVm(page);
  await Promise.all([refreshMap(), refreshWalk()]);
}

// ---- VMs ----

function showOverview(overview) {
  state.jaeger = overview.jaeger_url;
  state.moduleUp = overview.module.up;
  const module = $('module');
  module.className = overview.module.up ? 'module up' : 'module down';
  module.textContent = overview.module.up
    ? `TDX module ${overview.module.instance} · ${count(overview.module.host_pages_in_use)} host pages in use`
    : `No TDX module: ${overview.module.reason}`;
  const shown = overview.vms.length, all = overview.vms_total;
  $('vms-count').textContent = shown < all ? `first ${shown} of ${count(all)}` : all ? count(all) : '';
  $('no-vms').hidden = all > 0;
  const known = new Map([...$('vms').children].map((item) => [item.dataset.vm, item]));
  for (const vm of overview.vms) {
    let item = known.get(String(vm.id));
    if (item) {
      known.delete(String(vm.id));
    } else {
      const button = el('button', { type: 'button' }, el('span'), el('small'));
      button.addEventListener('click', () => choose(vm.id));
      item = el('li', { 'data-vm': vm.id }, button);
      $('vms').append(item);
    }
    const button = item.firstChild;
    if (vm.id === state.vm) button.setAttribute('aria-current', 'true'); else button.removeAttribute('aria-current');
    setText(button.children[0], vm.label ? `${vm.id} · ${vm.label}` : `VM ${vm.id}`);
    setText(button.children[1], `${vm.state}, ${vm.mode}, ${bytes(vm.slot_bytes)}`);
    button.children[1].className = vm.reason ? 'bad' : '';
  }
  for (const gone of known.values()) gone.remove();
  if (state.vm === null && overview.vms.length > 0) choose(overview.vms[0].id);
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function choose(vm) {
  if (vm === state.vm) return;
  Object.assign(state, { vm, page: null, views: [], cells: [], selected: 0 });
  for (const item of $('vms').children) {
    const button = item.firstChild;
    if (Number(item.dataset.vm) === vm) button.setAttribute('aria-current', 'true'); else button.removeAttribute('aria-current');
  }
  $('facts').hidden = vm === null;
  $('result').replaceChildren();
  history.replaceState(null, '', vm === null ? '#' : `#vm=${vm}`);
  draw();
  if (vm !== null) refreshVm().catch(failed);
}

function showVm(page) {
  const first = state.page === null || state.page.memory_end !== page.memory_end;
  state.page = page;
  setText($('vm-title'), page.label ? `VM ${page.id} · ${page.label}` : `VM ${page.id}`);
  const facts = {
    State: page.state, Mode: page.mode, vCPUs: count(page.vcpus), 'Key id': page.hkid ?? 'none',
    Memory: bytes(page.slot_bytes), 'Pages mapped': count(page.pages_4k),
    'Page tables': bytes(page.page_table_bytes), TDR: page.tdr,
  };
  if (page.pages_2m) facts['2 MiB pages'] = count(page.pages_2m);
  if (page.pages_1g) facts['1 GiB pages'] = count(page.pages_1g);
  if (page.mrtd) facts.MRTD = `${page.mrtd.slice(0, 16)}…`;
  $('vm-facts').replaceChildren(...Object.entries(facts).map(([name, value]) =>
    el('div', {}, el('dt', {}, name), el('dd', {}, String(value)))));
  $('vm-reason').hidden = !page.reason;
  setText($('vm-reason'), page.reason || '');
  if (first) {
    const options = [el('option', { value: '' }, 'all memory'), ...page.slots.map((slot, at) =>
      el('option', { value: at }, `${slot.slot_id}: ${slot.gpa}, ${bytes(slot.size)}`))];
    $('slots').replaceChildren(...options);
    $('slots-label').hidden = page.slots.length < 2;
    state.views = [whole(0n, BigInt(page.memory_end))];
    state.selected = 0;
  }
}

// ---- the map ----

/** A view of `size` bytes from `gpa` in as few cells as fit, none smaller than `least`. */
function whole(gpa, size, least = LARGE) {
  let cell = least;
  while (size > cell * BigInt(OVERVIEW_CELLS)) cell *= 2n;
  const start = gpa / cell * cell;
  const cells = Number((gpa + size - start + cell - 1n) / cell);
  return { gpa: start, cell, cells: Math.max(1, cells) };
}

const view = () => state.views[state.views.length - 1];

async function refreshMap() {
  const now = view(), vm = state.vm;
  if (!now) return;
  const module = now.cell === PAGE && state.moduleUp && state.page.state !== 'dead';
  const map = await ask(`api/vms/${vm}/map?gpa=${hex(now.gpa)}&cell=${hex(now.cell)}&cells=${now.cells}&module=${module}`);
  if (now !== view() || vm !== state.vm) return;
  state.cells = map.runs.flatMap((run) => Array(run.n).fill(run));
  state.selected = Math.min(state.selected, Math.max(0, state.cells.length - 1));
  $('sampled').hidden = map.sampled === 1;
  setText($('sampled'), `So much is mapped that one in ${map.sampled} entries is read; zoom in for exact numbers.`);
  draw();
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  const names = [...STATES, 'ink', 'panel', 'differs', 'accent', 'line'];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

function draw() {
  makeRoom();
  const canvas = $('map'), now = view(), cells = state.cells;
  const width = canvas.clientWidth || 640, ratio = window.devicePixelRatio || 1;
  // Powers of two, so that rows start at round addresses.
  const wide = cells.length <= 64 ? 16 : cells.length <= 512 ? 32 : 64;
  state.columns = width < 420 ? Math.min(wide, 32) : wide;
  state.cellPx = Math.min(40, (width - 2) / state.columns);
  const rows = Math.max(1, Math.ceil(cells.length / state.columns)), px = state.cellPx;
  const height = Math.ceil(rows * px) + 2;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext('2d'), colour = colours(), gap = px >= 8 ? 1 : 0.5;
  context.scale(ratio, ratio);
  const totals = Object.fromEntries(STATES.map((name) => [name, 0]));
  let differing = 0;
  cells.forEach((cell, at) => {
    const x = (at % state.columns) * px + 1, y = Math.floor(at / state.columns) * px + 1, side = px - gap;
    const mapped = cell.private + cell.shared, pages = now ? Number(now.cell / PAGE) : 1;
    totals[cell.state] += 1;
    context.fillStyle = colour[cell.state === 'none' ? 'none' : 'free'];
    context.fillRect(x, y, side, side);
    if (cell.state !== 'none' && cell.state !== 'free') {
      const share = cell.state === 'frozen' || cell.state === 'blocked' ? 1 : Math.min(1, mapped / Math.max(1, Math.min(pages, cell.slot || pages)));
      const tall = Math.max(Math.min(3, side), Math.round(side * share * 2) / 2);
      context.fillStyle = colour[cell.state];
      context.fillRect(x, y + side - tall, side, tall);
    }
    if (cell.differs) {
      differing += 1;
      context.strokeStyle = colour.differs;
      context.lineWidth = 2;
      context.strokeRect(x + 1, y + 1, side - 2, side - 2);
    }
  });
  if (cells.length > 0) {
    const x = (state.selected % state.columns) * px, y = Math.floor(state.selected / state.columns) * px;
    context.lineWidth = 4;
    context.strokeStyle = colour.panel;
    context.strokeRect(x + 1, y + 1, px - gap, px - gap);
    context.lineWidth = 2;
    context.strokeStyle = colour.ink;
    context.strokeRect(x + 1, y + 1, px - gap, px - gap);
  }
  showRows(rows);
  showLegend(totals, differing);
  showWhere();
}

/** Room for the addresses of rows: as much as the longest one takes. */
function makeRoom() {
  const now = view(), list = $('rows');
  const last = now && state.cells.length ? hex(now.gpa + now.cell * BigInt(state.cells.length - 1)) : '';
  if (list.dataset.room === last) return;
  list.dataset.room = last;
  list.replaceChildren(el('li', { class: 'room' }, last));
  state.rows = null;
}

/** Addresses of as many rows as have room: of each, or of every second, fourth, eighth, … */
function showRows(rows) {
  const now = view(), list = $('rows');
  if (!now || state.cells.length === 0) return;
  const key = `${now.gpa} ${now.cell} ${rows} ${state.columns} ${state.cellPx}`;
  if (state.rows === key) return;
  state.rows = key;
  let every = 1;
  while (every * state.cellPx < 16) every *= 2;
  const labels = [list.firstChild];
  for (let row = 0; row < rows; row += every) {
    const label = el('li', {}, hex(now.gpa + now.cell * BigInt(row * state.columns)));
    label.style.top = `${(row + 0.5) * state.cellPx + 1}px`;
    labels.push(label);
  }
  list.replaceChildren(...labels);
}

function showLegend(totals, differing) {
  const items = STATES.map((name) => [name, NAMES[name], totals[name], MEANING[name]]);
  if (differing) items.push(['differs', 'mirror and module differ', differing, 'the two trees do not agree']);
  const text = JSON.stringify(items);
  if (state.legend === text) return;
  state.legend = text;
  $('legend').replaceChildren(...items.map(([name, label, cells, meaning]) =>
    el('li', { class: cells ? '' : 'absent', title: meaning, 'data-state': name, 'data-cells': cells },
      el('i', { class: `s-${name}` }), label, ...(cells ? [el('b', {}, count(cells))] : []))));
}

function showWhere() {
  const now = view();
  $('zoom-out').disabled = state.views.length < 2;
  $('zoom-in').disabled = !now || now.cell === PAGE || state.cells.length === 0;
  if (!now || state.cells.length === 0) {
    setText($('where'), state.vm === null ? 'Choose a VM.' : 'The VM has no memory.');
    setText($('cell'), '');
    return;
  }
  const size = now.cell * BigInt(state.cells.length);
  setText($('where'), `${count(state.cells.length)} cells of ${bytes(now.cell)}: ${hex(now.gpa)} to ${hex(now.gpa + size)}, ${bytes(size)}`);
  const cell = state.cells[state.selected], gpa = now.gpa + now.cell * BigInt(state.selected);
  const parts = [`${hex(gpa)}: ${MEANING[cell.state]}`];
  if (now.cell !== PAGE) {
    const pages = count(now.cell / PAGE);
    if (cell.private) parts.push(`${count(cell.private)} of ${pages} pages private`);
    if (cell.shared) parts.push(`${count(cell.shared)} of ${pages} pages shared`);
  } else if (cell.sept) {
    parts.push(`the module says ${cell.sept}`);
  }
  if (cell.differs) parts.push('mirror and module differ');
  setText($('cell'), parts.join(' · '));
}

function select(at) {
  if (state.cells.length === 0) return;
  state.selected = Math.max(0, Math.min(state.cells.length - 1, at));
  const now = view();
  $('gpa').value = hex(now.gpa + now.cell * BigInt(state.selected));
  if (now.cell <= LARGE) $('size').value = hex(now.cell);
  draw();
  refreshWalk().catch(failed);
}

function zoomIn() {
  const now = view();
  if (!now || now.cell === PAGE || state.cells.length === 0) return;
  const gpa = now.gpa + now.cell * BigInt(state.selected);
  show(whole(gpa, now.cell, now.cell === LARGE ? PAGE : LARGE));
}

function show(next) {
  state.views.push(next);
  state.selected = 0;
  state.cells = [];
  refreshMap().then(() => select(0)).catch(failed);
}

function zoomOut() {
  if (state.views.length < 2) return;
  const inner = state.views.pop(), now = view();
  state.selected = Number((inner.gpa - now.gpa) / now.cell);
  state.cells = [];
  const at = state.selected;
  refreshMap().then(() => select(at)).catch(failed);
}

function onKey(event) {
  const moves = {
    ArrowLeft: -1, ArrowRight: 1, ArrowUp: -state.columns, ArrowDown: state.columns,
    PageUp: -8 * state.columns, PageDown: 8 * state.columns,
  };
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key in moves) select(state.selected + moves[event.key]);
  else if (event.key === 'Home') select(0);
  else if (event.key === 'End') select(state.cells.length - 1);
  else if (event.key === 'Enter' || event.key === '+') zoomIn();
  else if (event.key === 'Escape' || event.key === '-' || event.key === 'Backspace') zoomOut();
  else return;
  event.preventDefault();
}

function cellAt(event) {
  const box = $('map').getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left - 1) / state.cellPx);
  const row = Math.floor((event.clientY - box.top - 1) / state.cellPx);
  const at = row * state.columns + column;
  return column >= 0 && column < state.columns && at >= 0 && at < state.cells.length ? at : null;
}

// ---- the two trees ----

function address() {
  const text = $('gpa').value.trim();
  if (!/^(0[xX][0-9a-fA-F]+|[0-9]+)$/.test(text)) return null;
  let gpa = BigInt(text);
  if ($('shared').checked && state.page) gpa |= 1n << BigInt(state.page.shared_bit);
  return gpa < 1n << 64n ? gpa : null;
}

async function refreshWalk() {
  const gpa = address(), vm = state.vm;
  if (gpa === null || vm === null || !state.page) return;
  let walk;
  try {
    walk = await ask(`api/vms/${vm}/walk?gpa=${hex(gpa)}`);
  } catch (error) {
    $('walk').tBodies[0].replaceChildren();
    setText($('walk-note'), error.message);
    return;
  }
  if (vm !== state.vm || gpa !== address()) return;
  const mirror = walk.root === 'mirror';
  setText($('own-tree'), mirror ? 'KVM’s mirror root' : 'KVM’s direct root');
  const asked = mirror && walk.asked;
  const mark = (entry) => (!asked ? '' : entry.differs ? '≠' : '=');
  const rows = walk.entries.map((entry) => el('tr', { class: asked && entry.differs ? 'differs' : '' },
    el('td', { class: 'mark', title: !asked ? '' : entry.differs ? 'they differ' : 'they agree' }, mark(entry)),
    el('td', {}, String(entry.level), el('small', {}, ` [${entry.index}]`)),
    el('td', { class: 'tree' }, entry.kind), el('td', { class: 'mono' }, entry.spte),
    el('td', { class: 'tree' }, entry.sept_state || (mirror && asked ? 'no table' : '—')),
    el('td', { class: 'mono' }, entry.sept_entry || '—')));
  const text = rows.map((row) => row.textContent).join('|');
  if (state.walk !== text) {
    state.walk = text;
    $('walk').tBodies[0].replaceChildren(...rows);
  }
  const attribute = walk.private_attribute ? 'private' : 'shared';
  setText($('walk-note'), `${walk.gpa} is ${walk.mapped ? 'mapped' : 'not mapped'}; its memory attribute says ${attribute}.`
    + (!mirror ? ' The direct root has no counterpart in the module.' : asked ? '' : ' The module cannot be asked.'));
}

// ---- actions ----

async function act(name, body) {
  const buttons = [...$('actions').querySelectorAll('button')];
  if (state.vm === null || !$('actions').reportValidity()) return;
  buttons.forEach((button) => { button.disabled = true; });
  const result = $('result');
  result.className = 'result';
  result.replaceChildren(el('p', {}, `${name}…`));
  try {
    const answer = await ask(`api/vms/${state.vm}/${name}`, body);
    result.replaceChildren(...RESULTS[name](answer, body));
    if (answer.trace_id) {
      result.append(el('a', { href: `${state.jaeger}/trace/${answer.trace_id}`, target: '_blank', rel: 'noreferrer' }, 'Trace in Jaeger'));
    }
  } catch (error) {
    result.className = 'result failed';
    result.replaceChildren(el('p', {}, `${name}: ${error.message}`));
  } finally {
    buttons.forEach((button) => { button.disabled = false; });
  }
  await refresh();
}

const calls = (pairs, separator) => el('ol', {}, ...pairs.map(([leaf, what]) => el('li', {}, `${leaf}${separator}${what}`)));
const plural = (amount, word) => `${count(amount)} ${word}${Number(amount) === 1 ? '' : 's'}`;

const RESULTS = {
  fault: (answer, body) => [
    el('p', {}, `Fault at ${body.gpa}: ${answer.ret_pf} in the ${answer.root} root, ${plural(answer.rpcs, 'message')} to the module`),
    ...(answer.seamcalls.length ? [calls(answer.seamcalls, ' → ')] : []),
  ],
  convert: (answer, body) => [
    el('p', {}, `${bytes(body.size)} from ${body.gpa} converted to ${body.to}: ${plural(answer.pages_zapped, 'page')} zapped, `
      + `${plural(answer.rpcs, 'message')}, ${plural(answer.kicks, 'kick')}, ${plural(answer.flushes, 'flush')}`.replace('flushs', 'flushes')),
    ...(answer.seamcalls.length ? [calls(answer.seamcalls, ' × ')] : []),
  ],
  audit: (answer) => [
    el('p', {}, `Audit: ${plural(answer.mismatches, 'mismatch')}`.replace('mismatchs', 'mismatches')
      + ` in ${count(answer.entries)} entries of ${plural(answer.tables, 'table')}, ${plural(answer.leaves, 'page')}, ${count(answer.frozen)} frozen`),
    ...(answer.first_mismatches.length ? [el('ol', {}, ...answer.first_mismatches.map((mismatch) =>
      el('li', {}, `${mismatch.gpa}, level ${mismatch.level}: ${mismatch.reason}`)))] : []),
  ],
};

function failed(error) {
  const result = $('result');
  result.className = 'result failed';
  result.replaceChildren(el('p', {}, error.message));
}

// ---- timeline and latency ----

function showBatches(answer) {
  if (answer.last < state.last) state.batches = [];
  state.last = answer.last;
  state.batches = state.batches.concat(answer.batches).slice(-KEPT_BATCHES);
  drawBatches();
  drawLatency(answer.round_trips);
}

function drawBatches() {
  const hide = $('hide-looks').checked;
  const shown = state.batches.filter((batch) => !hide || batch.more || batch.leaves.some(([leaf]) => !LOOKS.has(leaf)))
    .slice(-SHOWN_BATCHES).reverse();
  $('no-batches').hidden = shown.length > 0;
  const key = `${hide} ${shown.map((batch) => batch.number).join()}`;
  if (state.shown === key) return;
  state.shown = key;
  $('batches').tBodies[0].replaceChildren(...shown.map((batch) => {
    const time = new Date(batch.at_ms).toLocaleTimeString('en-GB') + '.' + String(batch.at_ms % 1000).padStart(3, '0');
    const leaves = batch.leaves.map(([leaf, calls]) => el('span', {}, leaf.replace('TDH.', ''), ...(calls > 1 ? [el('b', {}, ` ×${count(calls)}`)] : [])));
    if (batch.more) leaves.push(el('span', {}, '…'));
    return el('tr', { title: `batch ${batch.number}, by ${batch.via}` }, el('td', { class: 'time' }, time), el('td', { class: 'calls' }, ...leaves),
      el('td', { class: 'num' }, count(batch.ran)), el('td', { class: `k-${batch.kind}` }, batch.status.replace('TDX_', '')),
      el('td', { class: 'num' }, micros(batch.took_us)));
  }));
}

function drawLatency({ bounds, counts }) {
  const all = counts.reduce((sum, value) => sum + value, 0);
  const quantile = (share) => {
    let sum = 0;
    for (let at = 0; at < bounds.length; at += 1) {
      sum += counts[at];
      if (sum >= all * share) return `≤ ${micros(Math.round(bounds[at] * 1e6))}`;
    }
    return `> ${micros(bounds[bounds.length - 1] * 1e6)}`;
  };
  setText($('quantiles'), all === 0 ? 'None yet.'
    : `${count(all)} round trips: half ${quantile(0.5)}, 99 of 100 ${quantile(0.99)}`);
  const bars = $('bars');
  if (bars.children.length !== counts.length) {
    bars.replaceChildren(...counts.map((_, at) => el('div', {},
      el('i'), el('span', {}, at % 3 === 0 ? (at < bounds.length ? micros(bounds[at] * 1e6) : '∞') : ''))));
  }
  const most = Math.max(1, ...counts);
  counts.forEach((value, at) => {
    const bar = bars.children[at];
    const from = at === 0 ? 'up to ' : `${micros(bounds[at - 1] * 1e6)} to `;
    bar.title = at < bounds.length ? `${from}${micros(bounds[at] * 1e6)}: ${count(value)}` : `above ${micros(bounds[at - 1] * 1e6)}: ${count(value)}`;
    bar.firstChild.style.height = value === 0 ? '0' : `${Math.max(2, 100 * value / most)}%`;
  });
}

// ---- start ----

function start() {
  const wanted = /vm=(\d+)/.exec(location.hash);
  const map = $('map');
  map.addEventListener('keydown', onKey);
  map.addEventListener('click', (event) => { const at = cellAt(event); if (at !== null) select(at); });
  map.addEventListener('dblclick', (event) => { const at = cellAt(event); if (at !== null) { select(at); zoomIn(); } });
  $('zoom-in').addEventListener('click', zoomIn);
  $('zoom-out').addEventListener('click', zoomOut);
  $('slots').addEventListener('change', (event) => {
    const slot = state.page.slots[event.target.value];
    state.views.length = 1;
    if (slot) show(whole(BigInt(slot.gpa), BigInt(slot.size)));
    else { state.cells = []; refreshMap().then(() => select(0)).catch(failed); }
  });
  $('actions').addEventListener('submit', (event) => {
    event.preventDefault();
    const gpa = address();
    if (gpa !== null) act('fault', { gpa: hex(gpa), vcpu: Number($('vcpu').value), access: $('access').value });
  });
  for (const to of ['private', 'shared']) {
    $(`to-${to}`).addEventListener('click', () => act('convert', { gpa: $('gpa').value.trim(), size: $('size').value.trim(), to }));
  }
  $('audit').addEventListener('click', () => act('audit', {}));
  for (const id of ['gpa', 'shared']) $(id).addEventListener('change', () => refreshWalk().catch(failed));
  $('hide-looks').addEventListener('change', drawBatches);
  $('pause').addEventListener('click', (event) => {
    state.paused = !state.paused;
    event.target.setAttribute('aria-pressed', String(state.paused));
  });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
  new ResizeObserver(draw).observe(map.parentElement);
  showLegend(Object.fromEntries(STATES.map((name) => [name, 0])), 0);
  if (wanted) choose(Number(wanted[1]));
  refresh();
  setInterval(() => { if (!document.hidden) refresh(); }, EVERY_MS);
  document.addEventListener('visibilitychange', () => { if (!document.hidden) refresh(); });
}

start();

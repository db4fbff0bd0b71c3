// Draws the streams /live and /events; submits problems, pins and unpins engines. No build step, no other site.

const SAMPLES = 1200; // ten minutes
const JOBS = 100;
const EVENTS = 1000; // earlier events of jobs to show when the page opens
const DECISIONS = 100;
const COLOURS = ["#3b7dd8", "#d98324", "#3f9b58", "#a65bb8", "#c9484b", "#2f9e9e", "#8a7a2f", "#70757c"];
const byId = (id) => document.getElementById(id);

let token = sessionStorage.getItem("token") || "";
let team = {};
let charted = "";
let now = { states: {}, pinned: [] };
let samples = [];
let charts = null;
const jobs = new Map();

// ---- requests

// Sends a request with the token; asks the user for a token and sends it again if the service requires one.
async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.authorization = `Bearer ${token}`;
  if (options.body) headers["content-type"] = "application/json";
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) {
    await askForToken();
    return request(path, options);
  }
  return response;
}

let tokenDialog = null; // the promise of the open dialog, which all waiting requests share

function askForToken() {
  tokenDialog ??= new Promise((resolve) => {
    const dialog = byId("ask-token");
    dialog.showModal();
    dialog.addEventListener("close", () => {
      token = byId("token").value.trim();
      sessionStorage.setItem("token", token);
      tokenDialog = null;
      resolve();
    }, { once: true });
  });
  return tokenDialog;
}

async function errorMessage(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `${response.status} ${response.statusText}`;
}

// Reads server-sent events with fetch, because EventSource cannot send a token. Reconnects and resumes by itself.
async function follow(path, onEvent, onDisconnect) {
  let lastId = null;
  for (let pauseMs = 500; ; pauseMs = Math.min(pauseMs * 2, 8000)) {
    try {
      const response = await request(path, { headers: lastId === null ? {} : { "Last-Event-ID": lastId } });
      if (!response.ok) throw new Error(await errorMessage(response));
      pauseMs = 250;
      for await (const event of events(response.body)) {
        lastId = event.id ?? lastId;
        onEvent(event.kind, JSON.parse(event.data));
      }
      onDisconnect("the service closed the stream");
    } catch (error) {
      onDisconnect(error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, pauseMs));
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const event = { kind: "message", data: "", id: null };
      for (const line of block.split("\n")) {
        const colon = line.indexOf(": ");
        const [name, content] = [line.slice(0, colon), line.slice(colon + 2)];
        if (name === "data") event.data += content;
        else if (name === "event") event.kind = content;
        else if (name === "id") event.id = content;
      }
      if (event.data) yield event;
    }
  }
}

// ---- charts

// The engines, or their replicas on several devices, which are known once they start.
const engines = () => (Object.keys(now.states).length ? Object.keys(now.states) : [...new Set(Object.values(team))]);
const colour = (engine) => COLOURS[engines().indexOf(engine) % COLOURS.length];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

function chart(id, series, options = {}) {
  const axis = { stroke: () => css("--quiet"), grid: { stroke: () => css("--line"), width: 1 }, ticks: { show: false } };
  return new uPlot(
    {
      width: byId(id).clientWidth,
      height: 200,
      series: [{ label: "time", value: (_, v) => (v ? new Date(v * 1000).toLocaleTimeString() : "") }, ...series],
      axes: [{ ...axis }, { ...axis, size: 56, values: options.values }],
      scales: { y: { range: options.range ?? ((_, low, high) => [0, Math.max(high, 1) * 1.05]) } },
      bands: options.bands,
      legend: { live: true },
    },
    [[], ...series.map(() => [])],
    byId(id),
  );
}

function drawCharts() {
  const names = engines();
  charted = names.join();
  const percent = (_, value) => (value == null ? "" : `${(value * 100).toFixed(1)}%`);
  for (const id of ["shares", "queues", "use"]) byId(id).replaceChildren();
  charts = {
    // Stacked: each line is the sum of the shares up to its own, filled down to the line below it.
    shares: chart(
      "shares",
      names.map((name, place) => ({
        label: name, stroke: colour(name), fill: `${colour(name)}99`, width: 1,
        value: (u, _, series, index) => percent(null, samples[index] && shareOfAll(samples[index], name)),
      })),
      {
        range: (_, low, high) => [0, Math.min(1, Math.max(high, 0.01) * 1.1)],
        values: (_, ticks) => ticks.map((tick) => `${+(tick * 100).toFixed(2)}%`),
        bands: names.slice(1).map((_, place) => ({ series: [place + 2, place + 1] })),
      },
    ),
    queues: chart("queues", names.flatMap((name) => [
      { label: `${name} running`, stroke: colour(name), width: 2 },
      { label: `${name} waiting`, stroke: colour(name), width: 1, dash: [4, 4] },
    ])),
    use: chart(
      "use",
      [
        { label: "utilization", stroke: COLOURS[0], width: 1.5, value: percent },
        { label: "memory", stroke: COLOURS[1], width: 1.5, value: percent },
      ],
      { range: () => [0, 1.02], values: (_, ticks) => ticks.map((tick) => `${Math.round(tick * 100)}%`) },
    ),
  };
}

const devices = (sample) => Object.values(sample.devices);
const usedMemory = (device) => (device.total_bytes ? device.used_bytes / device.total_bytes : null);
const shareOfAll = (sample, name) => (sample.engines[name]?.share ?? 0) / devices(sample).length;

// The mean of the values that are known; null if none is.
function mean(values) {
  const known = values.filter((value) => value != null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function drawSamples() {
  if (charts && charted !== engines().join()) drawCharts();
  if (!charts || !samples.length) return;
  const names = engines();
  const times = samples.map((sample) => sample.at);
  let below = samples.map(() => 0);
  const stacked = names.map((name) => (below = samples.map((s, i) => below[i] + shareOfAll(s, name))));
  charts.shares.setData([times, ...stacked]);
  charts.queues.setData([times, ...names.flatMap((name) => [
    samples.map((s) => s.engines[name]?.running ?? null),
    samples.map((s) => s.engines[name]?.waiting ?? null),
  ])]);
  charts.use.setData([
    times,
    samples.map((s) => mean(devices(s).map((device) => device.utilization))),
    samples.map((s) => mean(devices(s).map(usedMemory))),
  ]);
}

// ---- tables and lists

function element(tag, text = "", className = "", ...children) {
  const node = document.createElement(tag);
  node.textContent = text;
  if (className) node.className = className;
  node.append(...children);
  return node;
}

const wholePercent = (part) => (part == null ? "" : `${Math.round(part * 100)}%`);
const milliseconds = (seconds, digits) => (seconds * 1000).toFixed(digits);
const granted = (grant) => `${(grant.share * 100).toFixed(1)}%${grant.max_active_seqs ? "" : ", paused"}`;
const concurrency = (moment) => moment.max_active_seqs || `paused ${moment.paused_s.toFixed(1)} s`;

// What a step of n sequences takes; the tooltip has all costs, and how much of them is measured.
function costCell({ step_s: step, sequence_s: sequence, prompt_token_s: token, confidence, fault }) {
  const cell = element("td", `${milliseconds(step, 1)} + ${milliseconds(sequence, 2)} n ms`, confidence ? "" : "quiet");
  cell.title = `A step takes ${milliseconds(step, 1)} ms, ${milliseconds(sequence, 2)} ms for each sequence, and `
    + `${(token * 1e6).toFixed(1)} µs for each prompt token. `
    + (fault ? `Assumed, because ${fault}.` : `${wholePercent(confidence)} of this is measured, the rest is assumed.`);
  return cell;
}

function deviceText(device) {
  const measured = wholePercent(device.lanes_confidence);
  const lanes = `${device.lanes.toFixed(1)} engines at full speed at once (${measured} measured)`;
  return [device.name, lanes, device.fault].filter(Boolean).join(" · ");
}

function drawDevices() {
  const shown = Object.entries(samples.at(-1)?.devices ?? {});
  const lines = shown.map(([name, device]) => (shown.length > 1 ? `device ${name}: ` : "") + deviceText(device));
  byId("devices").replaceChildren(...lines.map((line) => element("p", line, "quiet")));
}

const mib = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MiB`;

function drawEngines() {
  const last = samples.at(-1);
  const focused = document.activeElement?.dataset?.engine;
  byId("engines").replaceChildren(...engines().map((name) => {
    const moment = last?.engines[name];
    const swatch = element("span", "", "swatch");
    swatch.style.background = colour(name);
    const pinned = now.pinned.includes(name);
    const button = element("button", pinned ? "unpin" : "pin");
    button.dataset.engine = name;
    button.setAttribute("aria-label", `${pinned ? "unpin" : "pin"} ${name}`);
    button.onclick = () => togglePin(name, pinned);
    const seats = Object.keys(team).filter((seat) => team[seat] === name.split("@")[0]);
    return element("tr", "", "",
      element("td", "", "", swatch, name),
      element("td", seats.join(", ")),
      element("td", now.states[name] ?? ""),
      ...(moment
        ? [`${(moment.share * 100).toFixed(1)}%`, mib(moment.kv_cache_bytes), mib(moment.kv_used_bytes),
           moment.running, moment.waiting, concurrency(moment)]
        : ["", "", "", "", "", ""]).map((value) => element("td", String(value))),
      moment ? costCell(moment.cost) : element("td"),
      element("td", wholePercent(moment?.utilization)),
      element("td", "", "", button));
  }));
  if (focused) document.querySelector(`button[data-engine="${CSS.escape(focused)}"]`)?.focus();
}

function drawState() {
  const last = samples.at(-1);
  const parts = [now.unready ?? "ready"];
  if (now.policy) parts.push(`policy ${now.policy}${now.paused ? ", paused" : ""}`);
  if (last) parts.push(`${last.jobs.running ?? 0} jobs running, ${last.jobs.queued ?? 0} queued`);
  byId("state").textContent = parts.join(" · ");
}

const clock = (seconds) => element("time", new Date(seconds * 1000).toLocaleTimeString());

function drawJob(job) {
  const open = job.element?.querySelector("details")?.open ?? false;
  const steps = element("ul", "", "", ...job.steps.map((step) =>
    element("li", `${step.role}: ${step.input} → ${step.output}`, step.verdict ?? "")));
  const title = element("summary", "", "", clock(job.at), " ", element("span", job.state, job.state),
    ` ${job.problem ?? job.id.slice(0, 8)}`, job.answer ? ` → ${job.answer}` : "", job.error ? `: ${job.error}` : "",
    element("span", ` ${job.steps.length} steps`, "quiet"));
  const details = element("details", "", "", title, steps);
  details.open = open;
  const item = element("li", "", "", details);
  if (job.element) job.element.replaceWith(item);
  else {
    byId("jobs").querySelector(":scope > .quiet")?.remove();
    byId("jobs").prepend(item);
  }
  job.element = item;
}

function onJobEvent(_, event) {
  const job = jobs.get(event.job) ?? { id: event.job, at: event.at, steps: [] };
  if (job.complete) return; // loadJobs has loaded its result already
  if (event.kind === "replied") job.steps.push(...event.entries);
  else if (event.kind === "tool called") {
    const input = `${event.tool} ${JSON.stringify(event.arguments)}`;
    job.steps.push({ role: event.seat, input, output: "running", call: event.number });
  } else if (event.kind === "tool returned") {
    const step = job.steps.findLast((known) => known.call === event.number);
    if (step) Object.assign(step, { output: event.output, verdict: event.failed ? "failed" : null });
  } else if (event.kind === "anew") job.steps = [];
  else Object.assign(job, { state: event.kind, error: event.why });
  job.problem = event.problem ?? job.problem;
  job.answer = event.answer ?? job.answer;
  jobs.set(event.job, job);
  if (jobs.size > JOBS) {
    const [oldest] = jobs.keys();
    jobs.get(oldest).element?.remove();
    jobs.delete(oldest);
  }
  scheduleDraw(job);
}

// Many events may arrive between two frames; each job is drawn once per frame.
const changed = new Set();

function scheduleDraw(job) {
  if (!changed.size) {
    requestAnimationFrame(() => {
      for (const changedJob of changed) if (jobs.has(changedJob.id)) drawJob(changedJob);
      changed.clear();
    });
  }
  changed.add(job);
}

function drawDecision(decision) {
  const list = byId("decisions");
  if (list.firstElementChild?.className === "quiet") list.replaceChildren();
  const rows = Object.entries(decision.engines).map(([name, engine]) =>
    element("li", `${name} ${granted(engine)}: ${engine.reason}`));
  list.prepend(element("li", "", "", clock(decision.at), ` ${decision.policy}, ${decision.cause}: `,
    decision.fault ? element("span", decision.fault, "fault") : `${mib(decision.moved_bytes)} moved`,
    element("ul", "", "quiet", ...rows)));
  while (list.children.length > DECISIONS) list.lastElementChild.remove();
}

// ---- commands

async function togglePin(engine, pinned) {
  const response = await request(`/control/pins/${encodeURIComponent(engine)}`,
    pinned ? { method: "DELETE" } : { method: "PUT", body: "{}" });
  if (response.ok) now.pinned = Object.keys((await response.json()).pinned);
  else byId("state").textContent = await errorMessage(response);
  drawEngines();
}

byId("submit").addEventListener("submit", async (event) => {
  event.preventDefault();
  const outcome = byId("submitted");
  outcome.textContent = "submitting";
  const response = await request("/jobs", { method: "POST", body: JSON.stringify({ problem: byId("problem").value }) })
    .catch((error) => ({ ok: false, json: async () => ({ error: { message: error.message } }) }));
  outcome.textContent = response.ok
    ? `accepted as ${(await response.json()).id.slice(0, 8)}`
    : await errorMessage(response);
  outcome.className = response.ok ? "" : "fault";
  if (response.ok) byId("problem").value = "";
});

// ---- event streams

function onLiveEvent(kind, data) {
  if (kind === "history") {
    ({ team, now, samples } = data);
    drawCharts();
    byId("decisions").replaceChildren(element("li", "none yet", "quiet"));
    data.decisions.forEach(drawDecision);
  } else if (kind === "decision") {
    drawDecision(data);
    return;
  } else {
    now = data.now;
    if (data.sample) samples.push(data.sample);
    samples.splice(0, samples.length - SAMPLES);
  }
  drawSamples();
  drawEngines();
  drawDevices();
  drawState();
}

function onDisconnect(reason) {
  byId("state").textContent = `not connected: ${reason}; reconnecting`;
}

addEventListener("resize", () => {
  for (const [id, plot] of Object.entries(charts ?? {})) plot.setSize({ width: byId(id).clientWidth, height: 200 });
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawCharts();
  drawSamples();
});

async function loadJobs() {
  const response = await request("/jobs?limit=20").catch(() => null);
  if (!response?.ok) return;
  for (const { id, state, problem, result, submitted_at: at } of (await response.json()).jobs.reverse()) {
    const job = { id, state, problem, at, steps: result?.steps ?? [], complete: Boolean(result) };
    Object.assign(job, { answer: result?.answer, error: result?.error });
    drawJob(job);
    jobs.set(id, job);
  }
}

follow("/live", onLiveEvent, onDisconnect);
loadJobs().then(() => follow(`/events?last=${EVENTS}`, onJobEvent, () => {}));

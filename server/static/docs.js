// The routes of this server, from its openapi.json. URLs are relative: a proxy may serve the page under a prefix.
const $ = (id) => document.getElementById(id);

function create(name, text = "", parts = [], attributes = {}) {
  const element = document.createElement(name);
  element.textContent = text;
  Object.assign(element, attributes);
  element.append(...parts);
  return element;
}

/** Describes the allowed values of a schema. */
function allowed(schema, all) {
  const target = resolved(schema, all);
  const any = target.anyOf ?? target.oneOf;
  if (any) return any.map((option) => allowed(option, all)).join(" or ");
  if ("const" in target) return JSON.stringify(target.const);
  if (target.enum) return target.enum.map((value) => JSON.stringify(value)).join(", ");
  if (target.type === "array") return `list of ${allowed(target.items ?? {}, all)}`;
  const bounds = [
    ["minimum", "at least"], ["maximum", "at most"], ["multipleOf", "multiple of"],
    ["minLength", "characters, at least"], ["maxLength", "characters, at most"], ["pattern", "like"],
  ].filter(([key]) => key in target).map(([key, word]) => `${word} ${target[key]}`);
  return [target.type ?? "anything", ...bounds].join(", ");
}

function resolved(schema, all) {
  return schema.$ref ? all.components.schemas[schema.$ref.split("/").at(-1)] : schema;
}

function fields(schema, all) {
  const target = resolved(schema, all);
  const rows = Object.entries(target.properties ?? {}).map(([name, field]) => {
    const must = target.required?.includes(name) ? "required" : "default" in field ? `default ${JSON.stringify(field.default)}` : "";
    return create("tr", "", [
      create("td", "", [create("code", name)]),
      create("td", allowed(field, all), [create("br"), create("small", must)]),
      create("td", field.description ?? ""),
    ]);
  });
  const head = create("tr", "", ["field", "allowed", ""].map((text) => create("th", text)));
  return rows.length ? [create("table", "", [head, ...rows])] : [];
}

function bodies(operation, all) {
  return Object.entries(operation.requestBody?.content ?? {}).flatMap(([type, { schema }]) => [
    create("h4", `Body: ${type}`),
    ...fields(schema ?? {}, all),
  ]);
}

function answers(operation) {
  const rows = Object.entries(operation.responses ?? {}).map(([status, answer]) =>
    create("tr", "", [create("td", status), create("td", answer.description ?? ""), create("td", Object.keys(answer.content ?? {}).join(", "))]));
  return [create("h4", "Answers"), create("table", "", rows)];
}

/** Returns a form that sends a request, for routes without parameters and with a JSON body or none. */
function attempt(path, method, operation) {
  const json = operation.requestBody?.content?.["application/json"];
  if (path.includes("{") || (operation.requestBody && !json)) return [];
  const example = Object.values(json?.examples ?? {})[0]?.value ?? {};
  const body = create("textarea", "", [], { value: JSON.stringify(example, null, 2), ariaLabel: `Body of ${path}` });
  const output = create("div", "", [], { ariaLive: "polite" });
  const send = create("button", "Send", [], { type: "button" });
  send.onclick = async () => {
    send.disabled = true;
    output.replaceChildren("...");
    try {
      const headers = $("key").value ? { authorization: `Bearer ${$("key").value}` } : {};
      if (json) headers["content-type"] = "application/json";
      const answer = await fetch(path.slice(1), { method: method.toUpperCase(), headers, body: json && body.value });
      const type = answer.headers.get("content-type") ?? "";
      const shown = type.startsWith("image/")
        ? create("img", "", [], { src: URL.createObjectURL(await answer.blob()), alt: "the answer" })
        : create("pre", (await answer.text()).slice(0, 20000));
      output.replaceChildren(create("p", `${answer.status} ${type}`), shown);
    } catch (error) {
      output.replaceChildren(create("p", String(error)));
    }
    send.disabled = false;
  };
  return [create("h4", "Try"), ...(json ? [body] : []), send, output];
}

async function show() {
  const answer = await fetch("openapi.json");
  if (!answer.ok) throw new Error(`openapi.json: ${answer.status}`);
  const all = await answer.json();
  $("title").textContent = `${all.info.title} ${all.info.version}`;
  $("about").textContent = all.info.description ?? "";
  const routes = Object.entries(all.paths).flatMap(([path, operations]) =>
    Object.entries(operations).map(([method, operation]) => {
      const summary = create("summary", "", [
        create("span", method.toUpperCase(), [], { className: "method" }),
        create("span", path, [], { className: "path" }),
        create("span", `  ${operation.summary ?? ""}`, [], { className: "what" }),
      ]);
      const description = create("p", operation.description ?? "");
      return create("details", "", [
        summary, description, ...bodies(operation, all), ...answers(operation), ...attempt(path, method, operation),
      ]);
    }));
  $("routes").replaceChildren(...routes);
}

show().catch((error) => {
  $("problem").textContent = String(error);
  $("problem").hidden = false;
});

// The routes of this server, from its own openapi.json. Every address is relative: a proxy may serve us under a prefix.
const $ = (id) => document.getElementById(id);

function made(name, text = "", parts = [], attributes = {}) {
  const element = document.createElement(name);
  element.textContent = text;
  Object.assign(element, attributes);
  element.append(...parts);
  return element;
}

/** What a schema allows, in a few words. */
function words(schema, all) {
  const found = resolved(schema, all);
  const any = found.anyOf ?? found.oneOf;
  if (any) return any.map((one) => words(one, all)).join(" or ");
  if ("const" in found) return JSON.stringify(found.const);
  if (found.enum) return found.enum.map((value) => JSON.stringify(value)).join(", ");
  if (found.type === "array") return `list of ${words(found.items ?? {}, all)}`;
  const bounds = [
    ["minimum", "at least"], ["maximum", "at most"], ["multipleOf", "multiple of"],
    ["minLength", "characters, at least"], ["maxLength", "characters, at most"], ["pattern", "like"],
  ].filter(([key]) => key in found).map(([key, word]) => `${word} ${found[key]}`);
  return [found.type ?? "anything", ...bounds].join(", ");
}

function resolved(schema, all) {
  return schema.$ref ? all.components.schemas[schema.$ref.split("/").at(-1)] : schema;
}

function fields(schema, all) {
  const found = resolved(schema, all);
  const rows = Object.entries(found.properties ?? {}).map(([name, field]) => {
    const must = found.required?.includes(name) ? "required" : "default" in field ? `default ${JSON.stringify(field.default)}` : "";
    return made("tr", "", [
      made("td", "", [made("code", name)]),
      made("td", words(field, all), [made("br"), made("small", must)]),
      made("td", field.description ?? ""),
    ]);
  });
  const head = made("tr", "", ["field", "allowed", ""].map((text) => made("th", text)));
  return rows.length ? [made("table", "", [head, ...rows])] : [];
}

function bodies(operation, all) {
  return Object.entries(operation.requestBody?.content ?? {}).flatMap(([type, { schema }]) => [
    made("h4", `Body: ${type}`),
    ...fields(schema ?? {}, all),
  ]);
}

function answers(operation) {
  const rows = Object.entries(operation.responses ?? {}).map(([status, answer]) =>
    made("tr", "", [made("td", status), made("td", answer.description ?? ""), made("td", Object.keys(answer.content ?? {}).join(", "))]));
  return [made("h4", "Answers"), made("table", "", rows)];
}

/** A form that sends the request, for routes without parameters and with a body of JSON or none. */
function attempt(path, method, operation) {
  const json = operation.requestBody?.content?.["application/json"];
  if (path.includes("{") || (operation.requestBody && !json)) return [];
  const example = Object.values(json?.examples ?? {})[0]?.value ?? {};
  const body = made("textarea", "", [], { value: JSON.stringify(example, null, 2), ariaLabel: `Body of ${path}` });
  const told = made("div", "", [], { ariaLive: "polite" });
  const send = made("button", "Send", [], { type: "button" });
  send.onclick = async () => {
    send.disabled = true;
    told.replaceChildren("...");
    try {
      const headers = $("key").value ? { authorization: `Bearer ${$("key").value}` } : {};
      if (json) headers["content-type"] = "application/json";
      const answer = await fetch(path.slice(1), { method: method.toUpperCase(), headers, body: json && body.value });
      const type = answer.headers.get("content-type") ?? "";
      const shown = type.startsWith("image/")
        ? made("img", "", [], { src: URL.createObjectURL(await answer.blob()), alt: "the answer" })
        : made("pre", (await answer.text()).slice(0, 20000));
      told.replaceChildren(made("p", `${answer.status} ${type}`), shown);
    } catch (error) {
      told.replaceChildren(made("p", String(error)));
    }
    send.disabled = false;
  };
  return [made("h4", "Try"), ...(json ? [body] : []), send, told];
}

async function show() {
  const answer = await fetch("openapi.json");
  if (!answer.ok) throw new Error(`openapi.json: ${answer.status}`);
  const all = await answer.json();
  $("title").textContent = `${all.info.title} ${all.info.version}`;
  $("about").textContent = all.info.description ?? "";
  const routes = Object.entries(all.paths).flatMap(([path, operations]) =>
    Object.entries(operations).map(([method, operation]) => {
      const summary = made("summary", "", [
        made("span", method.toUpperCase(), [], { className: "method" }),
        made("span", path, [], { className: "path" }),
        made("span", `  ${operation.summary ?? ""}`, [], { className: "what" }),
      ]);
      const description = made("p", operation.description ?? "");
      return made("details", "", [
        summary, description, ...bodies(operation, all), ...answers(operation), ...attempt(path, method, operation),
      ]);
    }));
  $("routes").replaceChildren(...routes);
}

show().catch((error) => {
  $("problem").textContent = String(error);
  $("problem").hidden = false;
});

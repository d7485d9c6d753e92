// What the openai package of npm gets from the server; prints one line of JSON a check.
import assert from "node:assert/strict";
import OpenAI, { AuthenticationError, BadRequestError, NotFoundError, RateLimitError } from "openai";

const { SHOAL_URL: url, SHOAL_MODEL: model, SHOAL_KEY: key, SHOAL_LIMITED_KEY: limited } = process.env;
const client = apiKey => new OpenAI({ baseURL: `${url}/v1`, apiKey, maxRetries: 0 });
const api = client(key);
const chat = {
  model, temperature: 0, max_tokens: 32, messages: [{ role: "user", content: "What is the capital of France?" }],
};
const schema = {
  type: "object", properties: { city: { type: "string", maxLength: 20 } }, required: ["city"], additionalProperties: false,
};
const weather = {
  type: "function",
  function: { name: "weather", parameters: { type: "object", properties: { city: { type: "string" } } } },
};
let whole = "";

const checks = {
  async chat() {
    whole = (await api.chat.completions.create(chat)).choices[0].message.content;
    assert.match(whole, /Paris/);
  },
  async streaming() {
    let text = "";
    for await (const piece of await api.chat.completions.create({ ...chat, stream: true })) {
      text += piece.choices[0]?.delta?.content ?? "";
    }
    assert.equal(text, whole);
  },
  async tools() {
    await assert.rejects(api.chat.completions.create({ ...chat, tools: [weather] }), error =>
      error instanceof BadRequestError && /tool/.test(error.message));
  },
  async json_schema() {
    const answer = await api.chat.completions.create({
      ...chat, max_tokens: 64, response_format: { type: "json_schema", json_schema: { name: "city", schema } },
    });
    assert.deepEqual(Object.keys(JSON.parse(answer.choices[0].message.content)), ["city"]);
  },
  async embeddings_refused() {
    const told = error => error instanceof NotFoundError && /there is no/.test(error.message);
    await assert.rejects(api.embeddings.create({ model, input: "x" }), told);
    await assert.rejects(api.moderations.create({ input: "x" }), told);
    assert.equal((await api.models.retrieve(model)).id, model);
  },
  async bad_request_400() {
    await assert.rejects(api.chat.completions.create({ ...chat, temperature: -3 }), BadRequestError);
  },
  async wrong_key_401() {
    await assert.rejects(client("wrong").chat.completions.create(chat), AuthenticationError);
  },
  async rate_limit_429() {
    const slow = client(limited);
    await assert.rejects(async () => {
      for (let i = 0; i < 3; i++) await slow.chat.completions.create({ ...chat, max_tokens: 1 });
    }, error => error instanceof RateLimitError && Number(error.headers.get("retry-after")) >= 1);
  },
};

for (const [check, run] of Object.entries(checks)) {
  let failure = null;
  try {
    await run();
  } catch (error) {
    failure = String(error);
  }
  console.log(JSON.stringify({ check, failure }));
}

// Evaluates a scene with the public OFREP providers and prints what they got: node evaluate.mjs URL TOKEN
import { OpenFeature } from '@openfeature/server-sdk';
import { OFREPProvider } from '@openfeature/ofrep-provider';
import { OpenFeature as WebOpenFeature } from '@openfeature/web-sdk';
import { OFREPWebProvider } from '@openfeature/ofrep-web-provider';

const [url, token] = process.argv.slice(2);
const headers = [['Authorization', `Bearer ${token}`]];
const context = { targetingKey: 'u1', age: 30 };

async function server() {
  await OpenFeature.setProviderAndWait(new OFREPProvider({ baseUrl: url, headers }));
  const client = OpenFeature.getClient();
  const shown = await client.getObjectDetails('welcome', {}, context);
  const missing = await client.getObjectDetails('nowhere', { mine: 1 }, context);
  await OpenFeature.close();
  return { shown, missing };
}

async function web() {
  const statuses = [];
  const fetchImplementation = async (...request) => {
    const answer = await fetch(...request);
    statuses.push(answer.status);
    return answer;
  };
  await WebOpenFeature.setContext(context);
  const provider = new OFREPWebProvider({ baseUrl: url, headers, pollInterval: 200, fetchImplementation });
  await WebOpenFeature.setProviderAndWait(provider);
  const client = WebOpenFeature.getClient();
  const shown = client.getObjectDetails('welcome', {});
  const missing = client.getObjectDetails('nowhere', { mine: 1 });
  const until = Date.now() + 20_000;
  while (statuses.length < 2 && Date.now() < until) await new Promise((done) => setTimeout(done, 50));
  await WebOpenFeature.close();
  return { shown, missing, statuses: statuses.slice(0, 2) };
}

console.log(JSON.stringify({ server: await server(), web: await web() }));
process.exit(0);
